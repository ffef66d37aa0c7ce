"""Sizes against a plain loop over one row, small cases by hand, and where a pruner gives them."""

from math import sqrt

import pytest
import torch
from torch import Tensor

import tprl.sizes
from ragged import alone, visual_tokens
from test_novelty import cos
from test_pruner import COUNTS, batch, make_pruner
from tprl.sizes import POWER, sizes


def slow(tokens: Tensor, keep: list[bool]) -> list[float]:
    """Of one row without padding."""
    found = [1.0] * len(tokens)
    kept = [i for i in range(len(tokens)) if keep[i]]
    for j in range(len(tokens)):
        if not keep[j]:
            nearest = max(kept, key=lambda i: cos(tokens[i], tokens[j]))
            found[nearest] += max(0.0, cos(tokens[nearest], tokens[j])) ** POWER
    return found


@pytest.mark.parametrize(("seed", "rows"), [(0, 1024), (1, 5)])
def test_sizes_slowly(seed: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tprl.sizes, "ROWS", rows)
    visual = visual_tokens(COUNTS, [1, 1, 1, 1], 3, seed)
    keep = torch.rand(visual.mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    keep[:, 0] = True
    keep &= visual.mask
    found = sizes(visual.tokens, keep, visual.mask)
    assert found.dtype == torch.float32
    assert (found[~keep] == 1).all()
    for row, count in enumerate(COUNTS):
        expected = torch.tensor(slow(visual.tokens[row, :count], keep[row, :count].tolist()))
        torch.testing.assert_close(found[row, :count], expected, rtol=1e-4, atol=1e-5)
    assert found.max() > 1.4


def test_sizes_by_hand() -> None:
    """A twin counts whole, one at 45 degrees as cos^4 = 1/4, one at a right angle and beyond not at all; of two kept
    tokens that are equally near the first counts it."""
    tokens = torch.tensor([[[1.0, 0, 0], [2, 0, 0], [1, 1, 0], [0, 0, 1], [-1, 0, 0], [0, -1, 0], [0, -3, 0]]])
    keep = torch.tensor([[True, False, False, False, False, True, False]])
    found = sizes(tokens, keep, torch.ones_like(keep))
    torch.testing.assert_close(found, torch.tensor([[2.25, 1, 1, 1, 1, 2, 1]]))
    assert POWER == 4
    both = torch.tensor([[[1.0, 1], [1, 0], [0, 1]]]) / sqrt(2)
    found = sizes(both, torch.tensor([[False, True, True]]), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(found, torch.tensor([[1, 1.25, 1]]))


def test_where_all_is_kept_each_stands_for_itself() -> None:
    visual = batch()
    assert torch.equal(sizes(visual.tokens, visual.mask, visual.mask), torch.ones(visual.mask.shape))


def test_a_pruner_gives_sizes_of_its_centred_tokens_unless_it_is_told_not_to() -> None:
    visual, pruner = batch(), make_pruner(proportional=True)
    budget = torch.tensor([3, 2, 1, 4])
    for selection in (pruner.select(visual, budget), pruner.select_above(visual, 0.5)):
        expected = sizes(pruner.normalise(visual.tokens), selection.keep_mask, visual.mask)
        assert selection.sizes is not None
        torch.testing.assert_close(selection.sizes, expected)
        assert not torch.allclose(expected, sizes(visual.tokens, selection.keep_mask, visual.mask), atol=1e-2)
    for row in range(len(visual)):
        single = pruner.select(alone(visual, row), budget[row : row + 1]).sizes
        together = pruner.select(visual, budget).sizes
        assert single is not None
        assert together is not None
        torch.testing.assert_close(single[0], together[row, : COUNTS[row]])
    visual.tokens.requires_grad_()
    sized = pruner.select(visual, budget).sizes
    assert sized is not None
    assert not sized.requires_grad
    without = make_pruner(proportional=False).select(visual, budget)
    assert without.sizes is None
    assert torch.equal(without.keep_mask, pruner.select(visual, budget).keep_mask)
