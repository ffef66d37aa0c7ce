"""DivPrune and CDPruner against plain loops over one sample, and small cases by hand."""

import math
from dataclasses import replace

import pytest
import torch
from rows import alone, make
from torch import Tensor

from tprl.selectors.similarity import CDPruner, DivPrune
from tprl.types import VisualTokens

SIZES, BUDGETS = [(6, 6), (3, 5), (7, 9)], [[1, 1, 1], [7, 4, 20], [30, 14, 41]]


def cos(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def given(tokens: Tensor, query: Tensor) -> VisualTokens:
    count = len(tokens)
    return VisualTokens(
        tokens[None], torch.ones(1, count, dtype=torch.bool), torch.zeros(1, count, 2), query[None, None],
        torch.ones(1, 1, dtype=torch.bool),
    )  # fmt: skip


def kept(keep_mask: Tensor) -> list[int]:
    return keep_mask.nonzero()[:, 0].tolist()


def slow_divprune(tokens: list[list[float]], budget: int) -> list[int]:
    count = len(tokens)
    distance = [[1 - cos(a, b) for b in tokens] for a in tokens]
    chosen = [max(range(count), key=lambda i: min(distance[i][j] for j in range(count) if j != i))]
    while len(chosen) < budget:
        free = [i for i in range(count) if i not in chosen]
        chosen.append(max(free, key=lambda i: min(distance[i][j] for j in chosen)))
    return sorted(chosen)


def slow_cdpruner(tokens: list[list[float]], query: list[list[float]], budget: int) -> list[int]:
    """Greedy by the determinants themselves, in double precision."""
    count = len(tokens)
    mean = [sum(column) / len(query) for column in zip(*query, strict=True)]
    cosines = [cos(token, mean) for token in tokens]
    low, high = min(cosines), max(cosines)
    r = [(c - low + 1e-6) / (high - low + 1e-6) for c in cosines]
    kernel = torch.tensor(
        [[r[i] * r[j] * cos(tokens[i], tokens[j]) for j in range(count)] for i in range(count)], dtype=torch.float64
    )
    chosen: list[int] = []
    while len(chosen) < budget:
        free = [i for i in range(count) if i not in chosen]

        def volume(i: int) -> float:
            subset = [*chosen, i]
            return torch.linalg.slogdet(kernel[subset][:, subset]).logabsdet.item()

        chosen.append(max(free, key=volume))
    return sorted(chosen)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_divprune_slowly(budget: list[int], seed: int) -> None:
    visual = make(SIZES, seed)
    keep = DivPrune().select(visual, torch.tensor(budget)).keep_mask
    for row, count in enumerate(budget):
        assert slow_divprune(alone(visual, row).tokens[0].tolist(), count) == kept(keep[row])


def test_divprune_by_hand() -> None:
    """On a circle: 200 degrees is loneliest (100 from the next), then 10 (170 away), 100 (90), 0 and 90 (10)."""
    angles = torch.tensor([0.0, 10, 90, 100, 200]).deg2rad()
    lengths = torch.tensor([[1.0], [5], [2], [1], [3]])
    visual = given(torch.stack([angles.cos(), angles.sin()], 1) * lengths, torch.zeros(2))
    for budget, expected in [(1, [4]), (2, [1, 4]), (3, [1, 3, 4])]:
        assert kept(DivPrune().select(visual, torch.tensor([budget])).keep_mask[0]) == expected


def test_divprune_starts_with_the_loneliest_though_padding_is_nearer() -> None:
    """On a circle, all neighbours farther than a right angle, which is what a token of zeros is away from each."""
    angles = torch.tensor([0.0, 100, 230]).deg2rad()
    visual = given(torch.stack([angles.cos(), angles.sin()], 1), torch.zeros(2))
    padded = replace(
        visual,
        tokens=torch.nn.functional.pad(visual.tokens, (0, 0, 0, 1)),
        mask=torch.tensor([[True, True, True, False]]),
        coords=torch.zeros(1, 4, 2),
    )
    assert kept(DivPrune().select(padded, torch.tensor([1])).keep_mask[0]) == [2]


def test_divprune_takes_one_of_each_kind_first() -> None:
    kinds = torch.eye(4)[torch.tensor([0, 0, 1, 2, 2, 2, 1, 3, 3, 0])]
    keep = kept(DivPrune().select(given(kinds, torch.zeros(4)), torch.tensor([4])).keep_mask[0])
    assert sorted(kinds.argmax(1)[keep].tolist()) == [0, 1, 2, 3]
    assert sorted(kinds.argmax(1)[:4].tolist()) != [0, 1, 2, 3]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_cdpruner_slowly(budget: list[int], seed: int) -> None:
    """Wide tokens, so that the kernel has full rank and every determinant is above zero."""
    visual = make(SIZES, seed, width=80)
    keep = CDPruner().select(visual, torch.tensor(budget)).keep_mask
    for row, count in enumerate(budget):
        one = alone(visual, row)
        assert slow_cdpruner(one.tokens[0].tolist(), one.query[0].tolist(), count) == kept(keep[row])


def test_cdpruner_by_hand() -> None:
    """r = 1, 1, 0.6, 0: after the first, its twin adds 0, the third 0.36 (1 - 0.36), the irrelevant fourth nothing."""
    tokens, query = torch.tensor([[1.0, 0], [1, 0], [0.6, 0.8], [0, 1]]), torch.tensor([2.0, 0])
    visual = given(tokens, query)
    assert kept(CDPruner().select(visual, torch.tensor([1])).keep_mask[0]) == [0]
    assert kept(CDPruner().select(visual, torch.tensor([2])).keep_mask[0]) == [0, 2]
    assert kept(CDPruner().select(given(tokens, torch.tensor([0.0, 2])), torch.tensor([2])).keep_mask[0]) == [2, 3]


def test_cdpruner_without_a_question_is_diverse_alone() -> None:
    visual = make([(6, 6)], width=80)
    silent = replace(visual, query_mask=torch.zeros_like(visual.query_mask))
    keep = CDPruner().select(silent, torch.tensor([12])).keep_mask[0]
    unit = torch.nn.functional.normalize(visual.tokens[0].double(), dim=-1)
    kernel, chosen = unit @ unit.T, [0]
    while len(chosen) < 12:
        gains = [-math.inf if i in chosen else kernel[[*chosen, i]][:, [*chosen, i]].det().item() for i in range(36)]
        chosen.append(max(range(36), key=gains.__getitem__))
    assert sorted(chosen) == kept(keep)
    assert not torch.equal(keep, CDPruner().select(visual, torch.tensor([12])).keep_mask[0])


def test_cdpruner_beyond_the_rank_of_the_tokens() -> None:
    """In two dimensions two tokens span all others; the rest come by relevance."""
    angles = torch.tensor([0.0, 15, 30, 45, 60, 75, 89])
    visual = given(torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], 1), torch.tensor([1.0, 0]))
    pair = kept(CDPruner().select(visual, torch.tensor([2])).keep_mask[0])
    r = angles.deg2rad().cos()
    volumes = [r[i].item() * math.sin(math.radians(angles[i].item())) for i in range(7)]
    assert pair == [0, max(range(7), key=volumes.__getitem__)] == [0, 3]
    assert kept(CDPruner().select(visual, torch.tensor([4])).keep_mask[0]) == [0, 1, 2, 3]


@pytest.mark.parametrize("sign", [1, -1])
def test_padding_is_neither_the_least_nor_the_most_relevant(sign: int) -> None:
    """All real cosines lie on one side of padding's 0, so a minimum or maximum over padding would be wrong."""
    visual, budget = make(SIZES, width=80), [7, 4, 20]
    mean = (visual.query * visual.query_mask[..., None]).sum(1, keepdim=True)
    leaning = replace(visual, tokens=(visual.tokens + sign * mean) * visual.mask[..., None])
    keep = CDPruner().select(leaning, torch.tensor(budget)).keep_mask
    for row, count in enumerate(budget):
        one = alone(leaning, row)
        cosines = [cos(token, one.query[0].mean(0).tolist()) for token in one.tokens[0].tolist()]
        assert all(sign * cosine > 0 for cosine in cosines)
        assert slow_cdpruner(one.tokens[0].tolist(), one.query[0].tolist(), count) == kept(keep[row])
