"""Demonstrations: nested, scored in one call a teacher, and the best of them for every sample by itself."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ragged import visual_tokens
from tprl.demonstrations import MemoScore, Search, demonstrate, make_teacher, nested_masks, teacher_signals
from tprl.env import Score
from tprl.rewards import step_rewards
from tprl.selectors import IN_MODEL, SELECTORS, InModel
from tprl.selectors.base import check
from tprl.types import Selection, VisualTokens

COUNTS = [8, 5, 2]


class Order:
    """Keeps the tokens that come first in an order of columns."""

    name = "order"
    needs: frozenset[str] = frozenset()

    def __init__(self, order: Sequence[int]) -> None:
        self.rank = torch.empty(len(order)).scatter(0, torch.tensor(order), torch.arange(len(order)).float())
        self.seen: list[Tensor] = []

    def select(self, visual: VisualTokens, budget: Tensor) -> Selection:
        check(self, visual, budget)
        self.seen.append(visual.mask)
        place = self.rank.expand(len(visual), -1).masked_fill(~visual.mask, torch.inf).argsort(1).argsort(1)
        return Selection(place < budget[:, None])


def with_signals(visual: VisualTokens) -> VisualTokens:
    random = torch.Generator().manual_seed(1)
    visual.signals["cls_attention"] = torch.rand(visual.mask.shape, generator=random) * visual.mask
    visual.signals["tower_keys"] = torch.randn(*visual.mask.shape, 4, generator=random)
    visual.signals["text_attention"] = torch.rand(visual.mask.shape, generator=random) * visual.mask
    return visual


@pytest.mark.parametrize("name", ["text-attention", *SELECTORS])
def test_each_step_is_chosen_among_what_the_one_before_kept(name: str) -> None:
    visual, teacher = with_signals(visual_tokens([36, 16, 4], [3, 1, 2], 12)), make_teacher(name, 0)
    assert not isinstance(teacher, InModel)
    masks = nested_masks(teacher, visual, [12, 6, 3])
    assert masks.sum(2).tolist() == [[12, 12, 4], [6, 6, 4], [3, 3, 3]]
    held = visual.mask
    for mask in masks:
        assert not (mask & ~held).any()
        held = mask


def test_a_teacher_sees_what_is_still_held() -> None:
    teacher, visual = Order(range(8)), visual_tokens(COUNTS, [1, 1, 1], 4)
    masks = nested_masks(teacher, visual, [4, 1])
    assert torch.equal(torch.stack(teacher.seen), torch.stack([visual.mask, masks[0]]))
    assert masks[1].nonzero()[:, 1].tolist() == [0, 0, 0]


def weigh(weights: Tensor) -> Score:
    """``(B, N)`` weights as a score of masks ``(T, B, N)``."""
    return lambda masks: (masks * weights).sum(-1)


def test_the_best_teacher_of_each_sample_wins_by_hand() -> None:
    """Two orders, two samples of four tokens, budgets 2 and 1, gamma 0.5, alpha 1 and beta 0.4.

    Sample 0: token 0 is worth 1. From the left it stays: rewards 0 + 0.4 / 2, 0 + 0.4 / 2, return 0.2 + 0.1.
    From the right it goes at once: -1 + 0.2, 0.2, return -0.7. Sample 1: token 2 is worth 1. From the left it goes at
    once: return -0.7. From the right it goes in the second step, which is discounted: 0.2, -1 + 0.2, return -0.2.
    """
    visual = visual_tokens([4, 4], [1, 1], 4)
    weights = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]])
    left, right = Order(range(4)), Order([3, 2, 1, 0])
    score = weigh(weights)
    found = demonstrate([left, right], visual, [2, 1], torch.ones(2), score, alpha=1.0, beta=0.4, gamma=0.5, margin=0.0)
    assert found.teacher.tolist() == [0, 1]
    states = [[[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]]
    assert found.states.int().tolist() == states
    torch.testing.assert_close(found.returns, torch.tensor([0.3, -0.2]))
    # the order in which teachers are named says who is who, and nothing else
    turned = demonstrate([right, left], visual, [2, 1], torch.ones(2), score, 1.0, 0.4, 0.5, 0.0)
    assert turned.teacher.tolist() == [1, 0]
    assert torch.equal(turned.states, found.states)


def test_the_first_teacher_has_to_be_beaten_by_the_margin() -> None:
    """The second is better by 0.5 on the second sample."""
    visual = visual_tokens([4, 4], [1, 1], 4)
    score = weigh(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0.5]]))
    teachers = [Order(range(4)), Order([3, 2, 1, 0])]
    chosen = {
        margin: demonstrate(teachers, visual, [2, 1], torch.zeros(2), score, 1.0, 0.0, 1.0, margin)
        for margin in (0.0, 0.49, 0.51)
    }
    assert [found.teacher.tolist() for found in chosen.values()] == [[0, 1], [0, 1], [0, 0]]
    assert chosen[0.49].returns.tolist() == [1.0, 0.5]  # what it is worth, not what it is worth less the margin
    assert chosen[0.51].returns.tolist() == [1.0, 0.0]


def test_no_teacher_would_have_done_better() -> None:
    visual = visual_tokens(COUNTS, [1, 1, 1], 4)
    random = torch.Generator().manual_seed(0)
    weights, unpruned = torch.randn(3, 8, generator=random), torch.randn(3, generator=random)
    teachers = [Order(torch.randperm(8, generator=random).tolist()) for _ in range(6)]
    found = demonstrate(teachers, visual, [4, 2], unpruned, weigh(weights), 1.0, 0.1, 0.9, 0.0)
    assert len(set(found.teacher.tolist())) > 1

    def value(masks: Tensor, row: int) -> float:
        states = [visual.mask[row], masks[0, row], masks[1, row]]
        scores = [unpruned[row], *(weights[row, mask].sum() for mask in states[1:])]
        rewards = step_rewards(
            torch.stack(scores)[None], torch.tensor([[int(mask.sum()) for mask in states]]), 1.0, 0.1
        )  # fmt: skip
        return float(rewards[0, 0] + 0.9 * rewards[0, 1])

    for row, teacher in enumerate(found.teacher.tolist()):
        values = [value(nested_masks(other, visual, [4, 2]), row) for other in teachers]
        assert values[teacher] == max(values)
        assert float(found.returns[row]) == pytest.approx(max(values), abs=1e-6)
        assert min(values) < max(values) or COUNTS[row] <= 2
        kept = found.states[row, 1:]
        assert torch.equal(kept, nested_masks(teachers[teacher], visual, [4, 2])[:, row])


def test_every_teacher_is_scored_in_one_call_with_all_steps() -> None:
    visual, calls = visual_tokens(COUNTS, [1, 1, 1], 4), []

    def score(masks: Tensor) -> Tensor:
        calls.append(tuple(masks.shape))
        return masks.sum(-1).float()

    demonstrate([Order(range(8)), Order(range(8))], visual, [4, 2, 1], torch.zeros(3), score, 1.0, 0.1, 0.9, 0.0)
    assert calls == [(3, 3, 8), (3, 3, 8)]


def test_teachers_by_name() -> None:
    assert [make_teacher(name, 0).name for name in ["text-attention", *SELECTORS]] == ["text-attention", *SELECTORS]
    visual = visual_tokens([30], [1], 4)
    keep = [make_teacher("random", seed).select(visual, torch.tensor([9])).keep_mask for seed in (0, 0, 1)]
    assert torch.equal(keep[0], keep[1])
    assert not torch.equal(keep[0], keep[2])
    assert [make_teacher(name, 0).name for name in IN_MODEL] == list(IN_MODEL)
    assert teacher_signals(["fastv", "fastervlm"]) == {"fastv": frozenset(), "fastervlm": {"cls_attention"}}
    with pytest.raises(ValueError, match=r"unknown teacher 'fastw'; known: text-attention, random, .*, dart"):
        make_teacher("fastw", 0)


def grid_tokens(side: int, batch: int) -> VisualTokens:
    """Pictures of ``side`` x ``side`` tokens; the last ones of the second are padding."""
    visual = visual_tokens([side * side, *[side * side - 3] * (batch - 1)], [1] * batch, 4)
    places = (torch.arange(side) + 0.5) / side
    visual.coords[:] = torch.cartesian_prod(places, places)
    return visual


def nested_start(visual: VisualTokens, budgets: Sequence[int]) -> Tensor:
    return nested_masks(Order(range(visual.mask.shape[1])), visual, budgets)


def test_search_finds_what_the_answer_needs_and_keeps_counts() -> None:
    """Tokens 20, 21, 26 and 27, a square of the 6 x 6 picture, are worth 1 each, the budgets are 12, 8 and 4; the start
    holds none of them in its last step."""
    visual = grid_tokens(6, 3)
    weights = torch.zeros(3, 36)
    weights[:, [20, 21, 26, 27]] = 1.0
    start = nested_start(visual, [12, 8, 4])

    def value(masks: Tensor) -> Tensor:
        return (masks[-1] * weights).sum(-1)

    assert value(start).tolist() == [0, 0, 0]
    values = []
    for rounds in (0, 3, 10, 40):
        found = Search(rounds, 4, seed=0).improve(start, torch.ones(3, 36), visual, value)
        assert torch.equal(found.sum(-1), start.sum(-1))
        assert bool((found[1:] <= found[:-1]).all())
        assert not bool((found & ~visual.mask).any())
        values.append(value(found))
    assert torch.equal(Search(0, 4, 0).improve(start, torch.ones(3, 36), visual, value), start)
    assert all(bool((later >= earlier).all()) for earlier, later in pairwise(values))
    assert bool((values[-1] >= 2).all())
    again = Search(40, 4, 0).improve(start, torch.ones(3, 36), visual, value)
    assert torch.equal(again, found)


def test_hints_lead_the_search() -> None:
    """With hints at the square that is needed, two generations do what takes tens of them without."""
    visual = grid_tokens(6, 3)
    weights, hints = torch.zeros(3, 36), torch.full((3, 36), 1e-6)
    weights[:, [20, 21, 26, 27]] = 1.0
    hints[:, [20, 21, 26, 27]] = 1.0
    start = nested_start(visual, [12, 8, 4])
    found = [
        Search(2, 4, 0).improve(start, hint, visual, lambda masks: (masks * weights).sum((0, 2)))
        for hint in (hints, torch.ones(3, 36))
    ]
    told, untold = ((masks * weights).sum((0, 2)) for masks in found)
    assert bool((told > untold).all())


def test_a_memo_asks_once_for_what_a_row_keeps() -> None:
    asked: list[list[int]] = []

    def worth(rows: Tensor, masks: Tensor) -> Tensor:
        asked.append(rows.tolist())
        return masks.sum(1) + 10.0 * rows

    memo = MemoScore(worth)
    masks = torch.tensor([[[1, 0, 0], [1, 1, 0]], [[1, 0, 0], [1, 0, 0]]]).bool()
    assert memo(masks).tolist() == [[1, 12], [1, 11]]
    assert sorted(asked[0]) == [0, 1, 1]  # row 0 keeps the same twice
    assert memo(masks.flip(0)).tolist() == [[1, 11], [1, 12]]
    assert len(asked) == 1
    assert memo(~masks)[0].tolist() == [2, 11]
    assert sum(map(len, asked)) == 6


def test_search_competes_from_the_best_teacher_and_is_bounded() -> None:
    """Both teachers keep one of the two tokens that count; the search finds both where it is allowed to."""
    visual = grid_tokens(6, 3)
    weights = torch.zeros(3, 36)
    weights[:, 0], weights[:2, 14] = 1.0, 5.0
    teachers = [Order(range(36)), Order([*range(14, 36), *range(14)])]
    asked: list[int] = []

    def worth(rows: Tensor, masks: Tensor) -> Tensor:
        asked.append(len(rows))
        return (masks * weights[rows]).sum(1)

    memo = MemoScore(worth)
    run = (visual, [12, 8, 4], torch.zeros(3), memo, 1.0, 0.1, 0.99, 0.0)
    without = demonstrate(teachers, *run)
    assert without.teacher.tolist() == [1, 1, 0]
    before = sum(asked)
    found = demonstrate(teachers, *run, Search(30, 4, seed=1))
    assert found.teacher.tolist() == [2, 2, 0]  # the third has all there is to have
    assert bool((found.returns[:2] > without.returns[:2]).all())
    assert found.returns[2] == without.returns[2]
    assert 0 < sum(asked) - before <= 30 * 4 * 3 * 3
    nothing = demonstrate(teachers, *run, Search(0, 4, seed=1))
    assert torch.equal(nothing.teacher, without.teacher)


def test_the_search_may_win_by_any() -> None:
    """Another teacher has to beat the first one by the margin, here 0.5; a token worth 0.1 is enough for the search."""
    visual, weights = grid_tokens(6, 1), torch.zeros(1, 36)
    weights[0, 0], weights[0, 14] = 1.0, 0.1
    score = MemoScore(lambda rows, masks: (masks * weights[rows]).sum(-1))
    run = (visual, [12, 8, 4], torch.zeros(1), score, 1.0, 0.0, 1.0, 0.5)
    assert demonstrate([Order(range(36))], *run, Search(30, 4, seed=1)).teacher.tolist() == [1]


def test_search_stays_where_nothing_is_worth_more_and_differs_from_seed_to_seed() -> None:
    visual = grid_tokens(6, 3)
    start, hints = nested_start(visual, [12, 8, 4]), torch.ones(3, 36)
    assert torch.equal(Search(5, 4, 0).improve(start, hints, visual, lambda masks: torch.zeros(3)), start)
    weights = torch.rand(3, 36, generator=torch.Generator().manual_seed(0))
    found = [Search(5, 4, seed).improve(start, hints, visual, lambda m: (m * weights).sum((0, 2))) for seed in (0, 1)]
    assert not torch.equal(*found)


def test_every_second_child_moves_a_single_token() -> None:
    """Of what the start drops, token 21 alone is worth having; whatever comes with it costs more than it is worth."""
    visual = grid_tokens(6, 1)
    start = nested_start(visual, [12])
    weights = torch.where(start[0, 0], 0.0, -1.0)
    weights[21] = 0.5
    found = Search(100, 4, 0).improve(start, torch.ones(1, 36), visual, lambda masks: (masks[0] * weights).sum(1))
    assert (found & ~start)[0, 0].nonzero().tolist() == [[21]]


def test_search_among_fewer_tokens_than_a_block_has() -> None:
    """What is last is worth most; padding would be worth more than all."""
    visual, weights = visual_tokens([3, 2], [1, 1], 4), torch.tensor([[0.0, 1, 2], [0, 1, 9]])
    start = nested_start(visual, [2, 1])
    assert start.sum(0).tolist() == [[2, 1, 0], [2, 1, 0]]
    found = Search(10, 4, 0).improve(start, torch.ones(2, 3), visual, lambda masks: (masks * weights).sum((0, 2)))
    assert found.sum(0).tolist() == [[0, 1, 2], [1, 2, 0]]


def test_search_starts_from_the_best_and_proposes_what_teachers_kept_for_long() -> None:
    given = []

    class Watched(Search):
        def improve(self, start: Tensor, hints: Tensor, *rest: object) -> Tensor:
            given.append((start, hints))
            return start

    visual = visual_tokens([4, 4], [1, 1], 4)
    score = weigh(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1]]))
    teachers = [Order(range(4)), Order([3, 1, 2, 0])]
    found = demonstrate(teachers, visual, [2, 1], torch.ones(2), score, 1.0, 0.1, 1.0, 0.0, Watched(1, 1, 0))
    ((start, hints),) = given
    assert torch.equal(start.transpose(0, 1), found.states[:, 1:])
    assert start.int().tolist() == [[[1, 1, 0, 0], [0, 1, 0, 1]], [[1, 0, 0, 0], [0, 0, 0, 1]]]
    assert hints.tolist() == [[1 + 2, 1 + 1 + 1, 1, 1 + 2]] * 2
