"""Random and uniform choices against what can be counted by hand."""

import math
from dataclasses import replace

import pytest
import torch
from rows import grid, make

from tprl.selectors.grid import Random, UniformGrid, _mix
from tprl.types import VisualTokens


def questions(count: int, tokens: int, seed: int = 0) -> VisualTokens:
    """One picture, asked ``count`` different questions."""
    visual = make([(1, tokens)], seed)
    query = torch.randn(count, 4, visual.query.shape[-1], generator=torch.Generator().manual_seed(seed))
    rows = {name: getattr(visual, name).expand(count, *getattr(visual, name).shape[1:]) for name in ("tokens", "mask")}
    return VisualTokens(**rows, coords=visual.coords.expand(count, -1, -1), query=query, query_mask=query[..., 0] < 9)


def test_mix_is_splitmix64() -> None:
    """The first three outputs of the published generator seeded with 0: the finaliser of its counter."""
    golden, wrap = 0x9E3779B97F4A7C15, 1 << 64
    counter = [(golden * i + wrap // 2) % wrap - wrap // 2 for i in (1, 2, 3)]
    mixed = [number % wrap for number in _mix(torch.tensor(counter)).tolist()]
    assert mixed == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_random_is_uniform() -> None:
    draws, tokens, budget = 4000, 30, 9
    keep = Random(3).select(questions(draws, tokens), torch.full((draws,), budget)).keep_mask.double()
    share = budget / tokens
    spread = math.sqrt(share * (1 - share) / draws)
    assert (keep.mean(0) - share).abs().max() < 5 * spread
    together = keep.T @ keep / draws
    pair = share * (budget - 1) / (tokens - 1)
    off = ~torch.eye(tokens, dtype=torch.bool)
    assert (together[off] - pair).abs().max() < 5 * math.sqrt(pair * (1 - pair) / draws)


def test_random_follows_seed_question_and_count_alone() -> None:
    visual, budget = make([(6, 6), (6, 6), (5, 7)]), torch.tensor([12, 12, 12])
    keep = Random(0).select(visual, budget).keep_mask
    assert torch.equal(keep, Random(0).select(visual, budget).keep_mask)
    assert not (keep == Random(1).select(visual, budget).keep_mask).all(1).any()
    assert not torch.equal(keep[0], keep[1])
    seen = replace(visual, tokens=visual.tokens + 1, coords=visual.coords * 0, signals={})
    assert torch.equal(keep, Random(0).select(seen, budget).keep_mask)
    asked = replace(visual, query=visual.query + 1e-3)
    assert not (keep == Random(0).select(asked, budget).keep_mask).all(1).any()
    swapped = replace(visual, query=visual.query[:, [1, 0, 2]], query_mask=visual.query_mask[:, [1, 0, 2]])
    swapped_keep = Random(0).select(swapped, budget).keep_mask
    assert torch.equal(swapped_keep[0], keep[0])
    assert not torch.equal(swapped_keep[2], keep[2])


@pytest.mark.parametrize("seed", [-1, 2**40, 2**63 - 1])
def test_any_seed(seed: int) -> None:
    assert Random(seed).select(make([(4, 4)]), torch.tensor([5])).keep_mask.sum() == 5


def test_random_sets_of_one_row_are_nested() -> None:
    visual = make([(6, 6)])
    small, large = (Random().select(visual, torch.tensor([k])).keep_mask for k in (5, 20))
    assert not (small & ~large).any()


@pytest.mark.parametrize(("side", "budget"), [(24, 144), (24, 64), (24, 576), (16, 64), (6, 4)])
def test_exact_lattices(side: int, budget: int) -> None:
    across = math.isqrt(budget)
    keep = UniformGrid().select(make([(side, side)]), torch.tensor([budget])).keep_mask.view(side, side)
    blocks = keep.view(across, side // across, across, side // across).sum((1, 3))
    assert (blocks == 1).all()
    rows, columns = keep.any(1).sum(), keep.any(0).sum()
    assert rows == columns == across
    stride = torch.zeros(side * side, dtype=torch.bool)
    stride[:: side * side // budget] = True
    assert budget in (4, 576) or stride.view(side, side).any(1).sum() != across


def test_uniform_slowly() -> None:
    visual = make([(6, 6), (3, 5), (7, 9)], seed=2)
    for budget in ([7, 4, 20], [1, 1, 1], [19, 14, 40]):
        keep = UniformGrid().select(visual, torch.tensor(budget)).keep_mask
        for row, count in enumerate(budget):
            total = int(visual.mask[row].sum())
            bands = round(math.sqrt(count))
            places = [tuple(place) for place in visual.coords[row, :total].tolist()]
            sequence = sorted(range(total), key=lambda i: (math.floor(places[i][0] * bands), places[i][1], i))
            ranks = [math.ceil((k * total - total // 2) / count) - 1 for k in range(1, count + 1)]
            assert sorted(sequence[rank] for rank in ranks) == keep[row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("budget", [192, 128, 64, 32])
def test_uniform_leaves_no_hole(budget: int) -> None:
    """Every token of 24 x 24 has a kept one near; drawn at random, some have none."""
    visual, places = make([(24, 24)]), grid(24, 24) * 24
    uniform, drawn = (
        torch.cdist(places, places[selector.select(visual, torch.tensor([budget])).keep_mask[0]]).amin(1).max()
        for selector in (UniformGrid(), Random())
    )
    assert uniform <= math.sqrt(576 / budget) < drawn
