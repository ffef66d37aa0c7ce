"""Selectors led by [CLS] attention against plain loops over one sample, and small cases by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from rows import alone, make
from torch import Tensor

from tprl.selectors.attention import FasterVLM, PruMergePlus, VisionZip, VisPruner
from tprl.selectors.base import Selector
from tprl.types import VisualTokens

Vector = list[float]
Slow = Callable[[list[Vector], Vector, list[Vector], int], dict[int, Vector]]
SIZES, BUDGETS = [(6, 6), (3, 5), (10, 12)], [[1, 1, 1], [7, 4, 64], [32, 13, 33], [35, 14, 100]]


def cos(a: Vector, b: Vector) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def highest(attention: Vector, count: int) -> list[int]:
    return sorted(range(len(attention)), key=lambda i: (-attention[i], i))[:count]


def spaced(candidates: list[int], count: int) -> list[int]:
    total = len(candidates)
    return [candidates[math.ceil((k * total - total // 2) / count) - 1] for k in range(1, count + 1)]


def kept(keep_mask: Tensor) -> list[int]:
    return keep_mask.nonzero()[:, 0].tolist()


def given(tokens: Tensor, attention: Tensor, keys: Tensor) -> VisualTokens:
    count = len(tokens)
    return VisualTokens(
        tokens[None], torch.ones(1, count, dtype=torch.bool), torch.zeros(1, count, 2),
        torch.zeros(1, 1, tokens.shape[1]), torch.ones(1, 1, dtype=torch.bool),
        {"cls_attention": attention[None], "tower_keys": keys[None]},
    )  # fmt: skip


def slow_visionzip(tokens: list[Vector], attention: Vector, keys: list[Vector], budget: int) -> dict[int, Vector]:
    contextual = budget * 5 // 32
    dominant = highest(attention, budget - contextual)
    rest = [i for i in range(len(tokens)) if i not in dominant]
    targets = spaced(rest, contextual)
    result = {i: tokens[i] for i in dominant}
    homes = {}
    for i in rest:
        if targets and i not in targets:
            affinity = [cos(keys[i], keys[target]) for target in targets]
            homes[i] = targets[affinity.index(max(affinity))]
    for target in targets:
        guests = [tokens[i] for i, home in homes.items() if home == target]
        result[target] = tokens[target]
        if guests:
            mean = [sum(column) / len(guests) for column in zip(*guests, strict=True)]
            result[target] = [(own + other) / 2 for own, other in zip(tokens[target], mean, strict=True)]
    return result


def slow_vispruner(tokens: list[Vector], attention: Vector, budget: int) -> list[int]:
    order = highest(attention, len(tokens))
    important, residue = order[: budget // 2], order[budget // 2 :]
    wanted = budget - budget // 2
    while len(residue) > wanted:
        even, odd = residue[::2], residue[1::2]
        even.sort(key=lambda i: -max(cos(tokens[i], tokens[j]) for j in odd))
        residue = even[min(8, len(residue) - wanted) :] + odd
    return sorted(important + residue)


def quantile(values: Vector, level: float) -> float:
    ordered = sorted(values)
    place = level * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def slow_prumerge(tokens: list[Vector], attention: Vector, keys: list[Vector], budget: int) -> dict[int, Vector]:
    first, third = quantile(attention, 0.25), quantile(attention, 0.75)
    fence = third + 1.5 * (third - first)
    outliers = [i for i in highest(attention, budget) if attention[i] > fence]
    others = [i for i in range(len(tokens)) if i not in outliers]
    result = {}
    for i in outliers + (spaced(others, budget - len(outliers)) if budget > len(outliers) else []):
        closeness = {j: cos(keys[i], key) for j, key in enumerate(keys) if j != i}
        neighbours = sorted(closeness, key=closeness.__getitem__, reverse=True)[:32]
        result[i] = [own + sum(attention[j] * tokens[j][d] for j in neighbours) for d, own in enumerate(tokens[i])]
    return result


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_fastervlm_and_vispruner_slowly(budget: list[int], seed: int) -> None:
    visual = make(SIZES, seed)
    faster = FasterVLM().select(visual, torch.tensor(budget)).keep_mask
    vis = VisPruner().select(visual, torch.tensor(budget)).keep_mask
    for row, count in enumerate(budget):
        one = alone(visual, row)
        attention = one.signals["cls_attention"][0].tolist()
        assert kept(faster[row]) == sorted(highest(attention, count))
        assert kept(vis[row]) == slow_vispruner(one.tokens[0].tolist(), attention, count)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("selector", "slow"), [(VisionZip(), slow_visionzip), (PruMergePlus(), slow_prumerge)])
def test_merging_slowly(budget: list[int], seed: int, selector: Selector, slow: Slow) -> None:
    visual = make(SIZES, seed)
    selection = selector.select(visual, torch.tensor(budget))
    assert selection.tokens is not None
    for row, count in enumerate(budget):
        one = alone(visual, row)
        attention, keys = one.signals["cls_attention"][0].tolist(), one.signals["tower_keys"][0].tolist()
        expected = slow(one.tokens[0].tolist(), attention, keys, count)
        assert kept(selection.keep_mask[row]) == sorted(expected)
        for index, token in expected.items():
            torch.testing.assert_close(selection.tokens[row, index], torch.tensor(token))


def test_fastervlm_by_hand() -> None:
    visual = given(torch.ones(5, 2), torch.tensor([0.1, 0.5, 0.2, 0.9, 0.2]), torch.ones(5, 2))
    for budget, expected in [(1, [3]), (2, [1, 3]), (3, [1, 2, 3]), (5, [0, 1, 2, 3, 4])]:
        assert kept(FasterVLM().select(visual, torch.tensor([budget])).keep_mask[0]) == expected


@pytest.mark.parametrize(("budget", "contextual"), [(192, 30), (128, 20), (64, 10), (16, 2), (6, 0)])
def test_visionzip_shares_as_published(budget: int, contextual: int) -> None:
    visual = make([(24, 24)])
    visual.signals["cls_attention"][0] = torch.arange(576, 0, -1) / 1e6
    keep = VisionZip().select(visual, torch.tensor([budget])).keep_mask[0]
    assert keep[: budget - contextual].all()
    assert not keep[budget - contextual]
    spacing = keep[budget - contextual :].nonzero()[:, 0].diff()
    assert keep[budget - contextual :].sum() == contextual
    assert contextual < 2 or spacing.max() - spacing.min() <= 1


def test_visionzip_by_hand() -> None:
    """Budget 13 is 11 + 2. Of the rest, 0 to 5, the targets are 1 and 4; keys send 0, 2 and 3 to 4, and 5 to 1."""
    keys, tokens = torch.ones(17, 2), torch.arange(17.0)[:, None].expand(17, 3)
    keys[:6] = torch.tensor([[0.0, 1], [1, 0], [0.1, 1], [0.4, 0.5], [0, 9], [0.5, 0.4]])
    attention = torch.arange(17) / 100
    selection = VisionZip().select(given(tokens, attention, keys), torch.tensor([13]))
    assert selection.tokens is not None
    assert kept(selection.keep_mask[0]) == [1, 4, *range(6, 17)]
    expected = torch.arange(17.0)
    expected[1], expected[4] = (1 + 5) / 2, (4 + (0 + 2 + 3) / 3) / 2
    torch.testing.assert_close(selection.tokens[0], expected[:, None].expand(17, 3))


def test_vispruner_by_hand() -> None:
    """Budget 4: 0 and 1 are important. Of 2, 3, 4, 5 the even places hold 2 and 4, and both are dropped."""
    tokens = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0.1], [0, 0.5, 1]])
    attention = torch.tensor([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert kept(VisPruner().select(given(tokens, attention, tokens), torch.tensor([4])).keep_mask[0]) == [0, 1, 3, 5]
    assert kept(VisPruner().select(given(tokens, attention, tokens), torch.tensor([5])).keep_mask[0]) == [0, 1, 2, 3, 5]


def test_vispruner_drops_the_twins() -> None:
    """Twenty pairs of twins, side by side in attention: the 10 dropped of 40 each leave their twin behind."""
    tokens = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)
    visual = given(tokens, torch.arange(40, 0, -1) / 1000, tokens)
    keep = VisPruner().select(visual, torch.tensor([30])).keep_mask[0]
    assert keep[:15].all()
    assert keep.view(20, 2).any(1).all()
    important = FasterVLM().select(visual, torch.tensor([30])).keep_mask[0]
    assert not important.view(20, 2).any(1).all()


def test_prumerge_by_hand() -> None:
    """Both quartiles are 0.01, so only the last token is an outlier; it absorbs the four others at 0.01 each."""
    tokens = torch.tensor([[1.0, 0], [2, 0], [0, 3], [0, 4], [10, 10]])
    visual = given(tokens, torch.tensor([0.01, 0.01, 0.01, 0.01, 0.09]), torch.randn(5, 3))
    one, three = (PruMergePlus().select(visual, torch.tensor([k])) for k in (1, 3))
    assert one.tokens is not None
    assert three.tokens is not None
    assert kept(one.keep_mask[0]) == [4]
    assert kept(three.keep_mask[0]) == [0, 2, 4]
    torch.testing.assert_close(one.tokens[0, 4], torch.tensor([10.03, 10.07]))
    torch.testing.assert_close(three.tokens[0, 0], torch.tensor([1 + 0.02 + 0.9, 0.03 + 0.04 + 0.9]))
    assert torch.equal(one.tokens[0, :4], tokens[:4])


def test_prumerge_keeps_the_strongest_outliers() -> None:
    attention = torch.full((40,), 0.001)
    attention[[3, 17, 25, 38]] = torch.tensor([0.2, 0.1, 0.3, 0.05])
    visual = given(torch.randn(40, 4), attention, torch.randn(40, 4))
    assert kept(PruMergePlus().select(visual, torch.tensor([2])).keep_mask[0]) == [3, 25]
    four, ten = (kept(PruMergePlus().select(visual, torch.tensor([k])).keep_mask[0]) for k in (4, 10))
    assert four == [3, 17, 25, 38]
    assert set(four) < set(ten)
    gaps = torch.tensor([i for i in ten if i not in four]).diff()
    assert gaps.min() >= 5
    assert gaps.max() <= 8


def test_prumerge_absorbs_32_neighbours_and_no_more() -> None:
    """Keys on an arc, the kept token at its start: token 33, the 33rd nearest, is the first left out."""
    angles = torch.arange(40) / 40
    keys = torch.stack([angles.cos(), angles.sin()], 1)
    attention = torch.full((40,), 0.01)
    attention[0] = 0.5
    selection = PruMergePlus().select(given(torch.eye(40), attention, keys), torch.tensor([1]))
    assert selection.tokens is not None
    assert selection.tokens[0, 0].nonzero()[:, 0].tolist() == list(range(33))
