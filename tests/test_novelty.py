"""Novelty against a plain loop over one row, and a small case by hand."""

import math

import pytest
import torch
from torch import Tensor

import tprl.novelty
from ragged import alone, visual_tokens
from test_pruner import COUNTS, batch, make_pruner
from tprl.novelty import novelty


def cos(a: Tensor, b: Tensor) -> float:
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    return dot / math.sqrt(sum(x * x for x in a.tolist()) * sum(y * y for y in b.tolist()))


def slow(logits: Tensor, latents: Tensor) -> list[float]:
    left = []
    for i in range(len(logits)):
        before = [j for j in range(len(logits)) if logits[j] > logits[i] or (logits[j] == logits[i] and j < i)]
        nearest = max([0.0, *(cos(latents[i], latents[j]) for j in before)])
        left.append(math.log(max(1 - nearest**2, 1e-5)))
    return left


@pytest.mark.parametrize(("seed", "rows"), [(0, 1024), (1, 5)])
def test_novelty_slowly(seed: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tprl.novelty, "ROWS", rows)
    visual = visual_tokens(COUNTS, [1, 1, 1, 1], 3, seed)
    logits = torch.randn(visual.mask.shape, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    found = novelty(logits, visual.tokens, visual.mask)
    assert (found[~visual.mask] == 0).all()
    for row, count in enumerate(COUNTS):
        expected = torch.tensor(slow(logits[row, :count], visual.tokens[row, :count]))
        torch.testing.assert_close(found[row, :count], expected, rtol=1e-4, atol=1e-5)


def test_padding_shows_nothing_whatever_it_holds() -> None:
    visual = visual_tokens(COUNTS, [1, 1, 1, 1], 3)
    visual.tokens[~visual.mask] = 1.0
    found = novelty(torch.zeros(visual.mask.shape), visual.tokens, visual.mask)
    assert (found[~visual.mask] == 0).all()


def test_novelty_by_hand() -> None:
    """At 0, 60, 90, 0 and 180 degrees, the likeliest first but for the fourth, which is likelier than the third."""
    angles = torch.tensor([0.0, 60, 90, 0, 180]).deg2rad()
    latents = torch.stack([angles.cos(), angles.sin()], 1)[None] * torch.tensor([3.0, 1, 2, 1, 1])[:, None]
    found = novelty(torch.tensor([[5.0, 4, 2, 3, 1]]), latents, torch.ones(1, 5, dtype=torch.bool))
    assert found[0].exp().tolist() == pytest.approx([1, 0.75, 0.25, 1e-5, 1], rel=1e-4)


def test_twins_do_not_take_each_others_places() -> None:
    """The likeliest token and a copy of it, which is as likely: with novelty one of the two places goes to another."""
    visual = batch()
    pruner, single = make_pruner(novelty=20.0), make_pruner(novelty=0.0)
    best = single.select(visual, torch.ones(4, dtype=torch.int64)).keep_mask
    first = int(best[0].nonzero())
    twin = (first + 1) % COUNTS[0]
    for part in (visual.tokens, visual.coords):
        part[0, twin] = part[0, first]
    budget = torch.tensor([2, 1, 1, 1])
    assert single.select(visual, budget).keep_mask[0, [first, twin]].all()
    assert pruner.select(visual, budget).keep_mask[0, [first, twin]].sum() == 1


def test_the_policy_is_trained_without_it() -> None:
    """What is learned is how much each token is needed; what its twins show is the business of the choice."""
    visual = batch()
    looks = [make_pruner(novelty=weight).look(make_pruner().encode(visual), visual, visual.mask) for weight in (0.0, 2)]
    assert torch.equal(looks[0].logits, looks[1].logits)


def test_probabilities_hold_it() -> None:
    pruner, visual = make_pruner(novelty=2.0), batch()
    single = make_pruner(novelty=0.0)
    with torch.no_grad():
        logits = single.look(single.encode(visual), visual, visual.mask).logits
        latents = single.encode(visual)[..., : single.config.latent]
    expected = (logits + 2 * novelty(logits, latents, visual.mask)).sigmoid() * visual.mask
    torch.testing.assert_close(pruner.keep_probs(visual), expected)
    row = alone(visual, 0)
    torch.testing.assert_close(pruner.keep_probs(row)[0], expected[0, : COUNTS[0]])
