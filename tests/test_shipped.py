"""The policy that ships: it knows what questions about scenes need, and the model answers as it did unpruned."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from tprl.data import load_source
from tprl.lvlm.cache import EncodedSamples
from tprl.pocket.assemble import SHIPPED_PRUNER, open_lvlm
from tprl.pruner import TokenPruner

QUESTIONS, BUDGET = 24, 32


@torch.no_grad()
def test_the_shipped_policy_keeps_what_questions_need(tmp_path: Path) -> None:
    lvlm = open_lvlm("pocket-llava", "float32", "cpu")
    data = EncodedSamples(lvlm, load_source("scenes", "val", QUESTIONS), tmp_path)
    pruner = TokenPruner.from_pretrained(SHIPPED_PRUNER, lvlm.fingerprint)
    random, shuffled = torch.Generator().manual_seed(0), deepcopy(pruner)
    for parameter in shuffled.parameters():
        parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel(), generator=random)].view_as(parameter))
    visual = data.visual(range(QUESTIONS))

    def accuracy(policy: TokenPruner) -> float:
        keep = policy.select(visual, torch.full((QUESTIONS,), BUDGET)).keep_mask
        return float(data.accuracy(range(QUESTIONS), visual.tokens, keep).mean())

    assert accuracy(pruner) > 0.8
    shuffled.config = replace(pruner.config, novelty=0)  # which by itself, as DivPrune, keeps more than chance does
    assert accuracy(shuffled) < 0.4


@torch.no_grad()
def test_proportional_attention_brings_answers_nearer_to_those_of_the_unpruned_model(tmp_path: Path) -> None:
    lvlm = open_lvlm("pocket-llava", "float32", "cpu")
    data = EncodedSamples(lvlm, load_source("scenes", "val", QUESTIONS), tmp_path)
    pruner = TokenPruner.from_pretrained(SHIPPED_PRUNER, lvlm.fingerprint)
    visual, everyone = data.visual(range(QUESTIONS)), range(QUESTIONS)
    selection = pruner.select(visual, torch.full((QUESTIONS,), 192))
    assert selection.sizes is not None
    shuffled = selection.sizes.flip(0)

    def distance(sizes: torch.Tensor | None) -> float:
        scores = data.score(everyone, visual.tokens, selection.keep_mask, sizes=sizes)
        return float((scores.log_prob - data.unpruned.log_prob).abs().median())

    assert distance(selection.sizes) < distance(None)
    assert distance(selection.sizes) < distance(shuffled)
