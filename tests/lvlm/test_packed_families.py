"""Answers scored in packed rows against the model itself, pruned by ``tprl.prune``, one question at a time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Gemma3TextConfig

from lvlm.processors import processor_of
from lvlm.tiny import CONFIGS, NAMES, make
from tprl.data.sample import Sample
from tprl.evaluate.latency import prompt_inputs
from tprl.lvlm.cache import EncodedSamples
from tprl.lvlm.model import Lvlm
from tprl.lvlm.packing import IGNORE
from tprl.lvlm.prune import prune
from tprl.lvlm.score import AnswerScorer, AnswerScores
from tprl.lvlm.text_attention import text_attention
from tprl.types import Selection, VisualTokens

FAR = 1e-2


class Pictures:
    """Two questions about each of three random pictures of different shapes."""

    name, split = "pictures", "test"

    def __init__(self) -> None:
        asked = [("what is it ?", "a cat"), ("is it", "cat")]
        self.samples: Sequence[Sample] = [
            Sample(f"{picture}-{number}", str(picture), question, (answer,), "word")
            for picture in range(3)
            for number, (question, answer) in enumerate(asked)
        ]

    def image(self, image_id: str) -> Image.Image:
        width, height = [(24, 24), (40, 20), (20, 44)][int(image_id)]
        rng = np.random.default_rng(int(image_id))
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    def version(self, image_id: str) -> str:
        return ""


class Given:
    """Keeps what it is told, of the sizes that it is told."""

    needs: frozenset[str] = frozenset()

    def __init__(self, keep: Tensor, sizes: Tensor | None = None) -> None:
        self.keep, self.sizes = keep, sizes

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        return Selection(self.keep[None], sizes=None if self.sizes is None else self.sizes[None])


@pytest.fixture(scope="module", params=NAMES)
def encoded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EncodedSamples:
    lvlm = Lvlm(make(request.param, torch.float32).model, processor_of(request.param))
    lvlm.model.generation_config.suppress_tokens = None
    return EncodedSamples(lvlm, Pictures(), tmp_path_factory.mktemp("cache"))


def keeps(encoded: EncodedSamples) -> dict[str, Tensor]:
    """Some of every picture's tokens."""
    random = torch.Generator().manual_seed(0)
    counts = {image_id: len(encoded.features(image_id).tokens) for image_id in encoded.image_ids}
    return {image_id: torch.rand(count, generator=random) < 0.5 for image_id, count in counts.items()}


def sizes_of(keep: dict[str, Tensor]) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    return {image_id: 1 + 9 * torch.rand(len(kept), generator=random) for image_id, kept in keep.items()}


def asked(encoded: EncodedSamples, index: int) -> dict[str, Any]:
    """What ``forward`` takes for a sample's prompt and answer, with labels, by the model's own processor."""
    inputs = dict(prompt_inputs(encoded.lvlm, encoded.source, encoded.source.samples[index]))
    block = encoded.block(index)
    answer = torch.tensor([block.ids[block.answer_start :]])
    ids = torch.cat([inputs["input_ids"], answer], 1)
    inputs["labels"] = torch.cat([torch.full_like(inputs["input_ids"], IGNORE), answer], 1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name, filler in (("token_type_ids", int(encoded.lvlm.family.both_ways == "prompts")), ("mm_token_type_ids", 0)):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, answer.shape[1]), value=filler)
    return inputs


@torch.no_grad()
def log_prob(
    encoded: EncodedSamples, index: int, keep: Tensor, sizes: Tensor | None = None, **options: Any
) -> tuple[float, bool]:
    """Mean log-probability of a sample's answer by the pruned model, and whether each token is the most likely one."""
    inputs = asked(encoded, index)
    with prune(encoded.lvlm.model, Given(keep, sizes), keep_ratio=0.5, **options):
        output = encoded.lvlm.model(**inputs)
    answer = inputs["labels"][inputs["labels"] != IGNORE]
    return -float(output.loss), bool((output.logits[0, -len(answer) - 1 : -1].argmax(-1) == answer).all())


def scored(encoded: EncodedSamples, keep: dict[str, Tensor], sizes: dict[str, Tensor] | None = None) -> AnswerScores:
    """Scores of all samples in order, where questions about a picture see the same tokens."""
    visual, indices, pictures = encoded.by_picture(encoded.image_ids)
    masks = pad_sequence([keep[image_id] for image_id in encoded.image_ids], batch_first=True)
    own = None if sizes is None else pad_sequence([sizes[image_id] for image_id in encoded.image_ids], True, 1.0)
    own = None if own is None else own[pictures]
    scores = encoded.score(indices, visual.tokens, masks[pictures], pictures=pictures, sizes=own)
    order = torch.tensor(indices).argsort()
    return AnswerScores(scores.log_prob[order], scores.correct[order])


def test_scores_are_those_of_the_pruned_model(encoded: EncodedSamples) -> None:
    keep = keeps(encoded)
    scores = scored(encoded, keep)
    everything = encoded.unpruned
    for index, sample in enumerate(encoded.samples):
        kept = keep[sample.image_id]
        wanted, correct = log_prob(encoded, index, kept)
        assert float(scores.log_prob[index]) == pytest.approx(wanted, abs=1e-4)
        assert bool(scores.correct[index]) == correct
        assert float(everything.log_prob[index]) == pytest.approx(
            log_prob(encoded, index, torch.ones_like(kept))[0], abs=1e-4
        )
    compact = [log_prob(encoded, i, keep[s.image_id], positions="compact")[0] for i, s in enumerate(encoded.samples)]
    assert (scores.log_prob - torch.tensor(compact)).abs().max() > FAR
    assert (scores.log_prob - everything.log_prob).abs().max() > FAR


def test_scores_of_sized_tokens_are_those_of_the_pruned_model(encoded: EncodedSamples) -> None:
    keep = keeps(encoded)
    sizes = sizes_of(keep)
    scores = scored(encoded, keep, sizes)
    for index, sample in enumerate(encoded.samples):
        wanted, correct = log_prob(encoded, index, keep[sample.image_id], sizes[sample.image_id])
        assert float(scores.log_prob[index]) == pytest.approx(wanted, abs=1e-4)
        assert bool(scores.correct[index]) == correct
    assert (scores.log_prob - scored(encoded, keep).log_prob).abs().max() > FAR


def test_prompts_are_the_processors(encoded: EncodedSamples) -> None:
    image_id = encoded.lvlm.model.config.image_token_id
    for index in range(len(encoded)):
        prefix, block = encoded.prefix([index]), encoded.block(index)
        ids = prefix.ids.masked_fill(prefix.visual, image_id)[0].tolist() + block.ids
        assert ids == asked(encoded, index)["input_ids"][0].tolist()
        positions = encoded.lvlm.model._prepare_position_ids_for_generation(
            torch.tensor([ids]), {**asked(encoded, index)}
        )
        positions = positions[None] if positions.ndim == 2 else positions[-3:]
        assert torch.equal(prefix.positions[:, 0], positions[:, 0, : prefix.ids.shape[1]])


def test_greedy_answers_are_those_of_generate(encoded: EncodedSamples) -> None:
    keep, model = keeps(encoded), encoded.lvlm.model
    told = sizes_of(keep)
    indices = range(len(encoded))
    visual = encoded.visual(indices)
    masks, sizes = torch.zeros_like(visual.mask), torch.ones(visual.mask.shape)
    for row, sample in enumerate(encoded.samples):
        masks[row, : len(keep[sample.image_id])] = keep[sample.image_id]
        sizes[row, : len(keep[sample.image_id])] = told[sample.image_id]
    prompts = [encoded.block(i).ids[: encoded.block(i).answer_start] for i in indices]
    prefix = encoded.prefix(indices)
    answers = encoded.scorer.generate(replace(prefix, sizes=sizes), visual.tokens, masks, prompts, -1, 4)
    assert answers != encoded.scorer.generate(prefix, visual.tokens, masks, prompts, -1, 4)
    for index, sample in enumerate(encoded.samples):
        inputs = prompt_inputs(encoded.lvlm, encoded.source, sample)
        given = Given(keep[sample.image_id], told[sample.image_id])
        with prune(model, given, keep_ratio=0.5), torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert output[0, inputs["input_ids"].shape[1] :].tolist() == answers[index]


@torch.no_grad()
def test_without_a_picture_the_text_alone_is_asked(encoded: EncodedSamples) -> None:
    indices = list(range(len(encoded)))
    nothing = torch.zeros(len(indices), 0)
    width = encoded.lvlm.width
    scores = encoded.score(indices, torch.zeros(len(indices), 0, width), nothing.bool())
    for index in indices:
        inputs = asked(encoded, index)
        text = inputs["input_ids"] != encoded.lvlm.model.config.image_token_id
        alone = {
            name: inputs[name][text][None]
            for name in ("input_ids", "labels", "attention_mask", "token_type_ids")
            if name in inputs
        }
        assert float(scores.log_prob[index]) == pytest.approx(-float(encoded.lvlm.model(**alone).loss), abs=1e-4)
        assert encoded.text_tokens(index) == int(text.sum()) - int((inputs["labels"] != IGNORE).sum())


def test_text_attention_of_questions_that_share_a_row_is_that_of_each_alone(encoded: EncodedSamples) -> None:
    image_id = encoded.image_ids[1]
    tokens, indices = encoded.features(image_id).tokens, encoded.questions[image_id]
    prefix, blocks = encoded.prefix(indices[:1]), [encoded.block(index) for index in indices]
    together = text_attention(encoded.scorer.reader, prefix, tokens, blocks)
    assert together.shape == (len(blocks), len(tokens))
    for row, block in zip(together, blocks, strict=True):
        torch.testing.assert_close(row, text_attention(encoded.scorer.reader, prefix, tokens, [block])[0])
    assert (together[0] - together[1]).abs().max() > 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sliding_windows_count_a_questions_own_tokens(attention: str, tmp_path: Path) -> None:
    """Gemma3's layers of both types, with a window that is shorter than the prompt."""
    text = Gemma3TextConfig(**{**CONFIGS["gemma3"]["text_config"].to_dict(), "sliding_window": 6})
    text.layer_types = ["sliding_attention", "full_attention"]
    with patch.dict(CONFIGS, {"gemma3": {**CONFIGS["gemma3"], "text_config": text}}):
        lvlm = Lvlm(make("gemma3", torch.float32, attention).model, processor_of("gemma3"))
    encoded = EncodedSamples(lvlm, Pictures(), tmp_path)
    keep = keeps(encoded)
    scores = scored(encoded, keep)
    wanted = [log_prob(encoded, index, keep[sample.image_id])[0] for index, sample in enumerate(encoded.samples)]
    torch.testing.assert_close(scores.log_prob, torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    encoded.scorer.language.config.sliding_window = 512
    assert (scored(encoded, keep).log_prob - torch.tensor(wanted)).abs().max() > FAR


def test_other_attention_is_refused() -> None:
    model = make("llava").model
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'sdpa' or 'eager', got 'flash_attention_2'"):
        AnswerScorer(model.model.language_model, model.lm_head)


def test_a_row_of_a_wider_batch_is_scored_as_in_it(encoded: EncodedSamples) -> None:
    """A process scores its share of a batch, which may lack the picture with the most tokens."""
    visual = encoded.visual(range(6))
    together = encoded.score(range(6), visual.tokens, visual.mask).log_prob
    for index in range(6):
        alone = encoded.score([index], visual.tokens[[index]], visual.mask[[index]]).log_prob
        torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs() > 1e-3
