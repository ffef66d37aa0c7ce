"""Attention of questions that share a row, against the model asked one question at a time."""

from pathlib import Path

import pytest
import torch

import tprl
from evaluate.world import World, tiny_lvlm
from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.text_attention import text_attention


def test_it_is_what_each_question_alone_attends_to(tmp_path: Path) -> None:
    lvlm = tiny_lvlm()
    data = EncodedSamples(lvlm, World(), tmp_path)
    indices = data.questions[data.image_ids[1]]
    tokens = data.features(data.image_ids[1]).tokens
    blocks = [data.block(index) for index in indices]
    together = text_attention(data.scorer.reader, data.prefix(indices[:1]), tokens, blocks)
    assert together.shape == (len(blocks), len(tokens))
    decoder, before = lvlm.model.get_decoder(), lvlm.prompts.ids("?")[0][:-1]
    decoder.set_attn_implementation("eager")
    start = len(before)
    for row, block in enumerate(blocks):
        prompt = block.ids[: block.answer_start]
        ids = torch.tensor([before + [0] * len(tokens) + prompt])
        embeds = decoder.get_input_embeddings()(ids)
        embeds[0, start : start + len(tokens)] = tokens
        with torch.no_grad():
            seen = decoder(inputs_embeds=embeds, output_attentions=True).attentions
        alone = torch.stack(seen)[:, 0, :, start + len(tokens) :, start : start + len(tokens)].mean(1)
        assert len(alone) == 6  # a quarter of them is one
        doubled = torch.ones(len(prompt), 1)
        doubled[-1] = 2
        torch.testing.assert_close(together[row], (doubled * alone[1:]).amax((0, 1)))
        for wrong in (doubled * alone, alone[1:], (doubled * alone[1:])[:, -1:]):
            assert not torch.allclose(together[row], wrong.amax((0, 1)), atol=1e-6)


def test_a_language_model_that_is_not_read_as_llama_is_refused_before_it_is_asked(tmp_path: Path) -> None:
    lvlm = tiny_lvlm()
    data = EncodedSamples(lvlm, World(1), tmp_path)
    lvlm.model.get_decoder().layers[1].self_attn.sinks = torch.zeros(1)
    tokens = data.features(data.image_ids[0]).tokens
    with pytest.raises(ValueError, match=r"cannot be looked into, .*: its attention has sinks"):
        text_attention(data.scorer.reader, data.prefix([0]), tokens, [data.block(0)])
    with pytest.raises(ValueError, match=r"cannot be looked into, .*: its attention has sinks"):
        tprl.prune(lvlm.model, "fastv", budget=2)
