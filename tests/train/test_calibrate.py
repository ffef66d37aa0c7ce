"""The threshold that calibration finds, against trying every one of them."""

import warnings
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch

from tprl.config import PrunerConfig
from tprl.train import calibrate as module
from tprl.train import pipeline
from tprl.train.calibrate import MOST_LOOKS, STRIDE, THRESHOLDS, OneShot, calibrate, choose_novelty
from train.puzzle import COUNT, Puzzle, make_pruner


@dataclass
class Pruner:
    """All of a pruner that calibration changes."""

    config: PrunerConfig


@pytest.mark.parametrize("costs_too_much_above", [1.0, 0.97, 0.5, 0.11, 0.0026, 1e-5, 0.0])
def test_it_is_the_highest_threshold_that_costs_no_more_than_is_allowed(
    monkeypatch: pytest.MonkeyPatch, costs_too_much_above: float
) -> None:
    asked = []

    def one_shot(pruner: Any, data: Any, unpruned: Any, threshold: float) -> OneShot:
        asked.append(threshold)
        return OneShot(0.9 if threshold > costs_too_much_above else 0.985, 0.99, kept=1 / threshold)

    monkeypatch.setattr(module, "one_shot", one_shot)
    pruner = Pruner(PrunerConfig(width=8, fingerprint="abc"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = calibrate(cast(Any, pruner), cast(Any, None), torch.ones(1), max_drop=1.0)
    allowed = [threshold for threshold in THRESHOLDS if threshold <= costs_too_much_above]
    assert pruner.config.threshold == max(allowed, default=THRESHOLDS[-1])
    assert result.kept == 1 / pruner.config.threshold
    assert len(set(asked)) == len(asked) <= MOST_LOOKS + 1
    assert min(asked) >= THRESHOLDS[min(THRESHOLDS.index(pruner.config.threshold) + STRIDE, len(THRESHOLDS) - 1)]
    assert bool(said) == (not allowed)


def test_a_threshold_that_loses_more_than_is_allowed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "one_shot", lambda *_, threshold: OneShot(0.9, 0.9325, kept=1.0))
    pruner = Pruner(PrunerConfig(width=8, fingerprint="abc"))
    with pytest.warns(UserWarning, match=r"at most 1\.5 points: 1\.1e-07, the lowest one, costs 3\.25 on") as said:
        result = calibrate(cast(Any, pruner), cast(Any, None), torch.ones(7), max_drop=1.5)
    assert [warning.filename for warning in said] == [__file__]
    assert (pruner.config.threshold, result.kept) == (THRESHOLDS[-1], 1.0)


@pytest.mark.parametrize(
    ("with_it", "without", "chosen"),
    [
        ({64: 0.75, 16: 0.5}, {64: 0.5, 16: 0.625}, 3.0),
        ({64: 0.75, 16: 0.5}, {64: 0.625, 16: 0.75}, 0.0),
        ({64: 0.3, 16: 0.0}, {64: 0.2, 16: 0.1}, 3.0),
    ],
    ids=["better with it", "better without it", "level"],
)
def test_novelty_stays_unless_the_first_samples_are_answered_better_without_it(
    monkeypatch: pytest.MonkeyPatch, with_it: dict[int, float], without: dict[int, float], chosen: float
) -> None:
    asked, unpruned = [], torch.ones(9)

    def one_shot(own: Any, data: Any, given: torch.Tensor, budget: int, most: int) -> OneShot:
        assert (own, data, given, most) == (pruner, "data", unpruned, 7)
        asked.append((own.config.novelty, budget))
        return OneShot((with_it if own.config.novelty else without)[budget], 1.0, kept=1.0)

    monkeypatch.setattr(module, "one_shot", one_shot)
    pruner = Pruner(PrunerConfig(width=8, fingerprint="abc", novelty=3.0))
    choose_novelty(cast(Any, pruner), cast(Any, "data"), unpruned, (64, 16), 7)
    assert sorted(asked) == [(0.0, 16), (0.0, 64), (3.0, 16), (3.0, 64)]
    assert pruner.config == PrunerConfig(width=8, fingerprint="abc", novelty=chosen)


def test_a_pruner_without_novelty_is_not_asked_whether_it_needs_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "one_shot", None)
    pruner = Pruner(PrunerConfig(width=8, fingerprint="abc", novelty=0.0))
    choose_novelty(cast(Any, pruner), cast(Any, None), torch.ones(1), (64,), 1)
    assert pruner.config.novelty == 0


def test_thresholds_fall_and_span_the_probabilities() -> None:
    assert list(THRESHOLDS) == sorted(set(THRESHOLDS), reverse=True)
    assert THRESHOLDS[0] > 0.98
    assert THRESHOLDS[-1] < 1e-6


def test_a_look_after_a_stage_is_at_the_first_samples_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "LOOKED_AT", 9)
    asked: list[int] = []

    class Watched(Puzzle):
        def accuracy(self, indices: Any, *given: Any, **named: Any) -> torch.Tensor:
            asked.extend(indices)
            return super().accuracy(indices, *given, **named)

    puzzle = cast(Any, Watched())
    metrics = pipeline._look_at(make_pruner(), puzzle, (torch.arange(len(puzzle)) < 9).float())
    assert metrics["accuracy_unpruned"] == 1
    assert sorted(asked) == sorted([*range(9)] * 3)  # by both budgets and by threshold


def test_one_shot_is_the_mean_over_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 16)
    puzzle, pruner = cast(Any, Puzzle()), make_pruner()
    everyone = range(len(puzzle))
    found, visual = module.one_shot(pruner, puzzle, torch.ones(len(puzzle)), budget=3), puzzle.visual(everyone)
    keep = pruner.select(visual, torch.full((len(puzzle),), 3)).keep_mask
    assert len(puzzle) > 2 * 16
    assert (found.kept, found.unpruned) == (3, 1)
    assert found.accuracy == pytest.approx(float(puzzle.accuracy(everyone, visual.tokens, keep).mean()))


def test_one_shot_shows_tokens_of_the_sizes_that_the_pruner_gives() -> None:
    told: list[torch.Tensor | None] = []

    class Watched(Puzzle):
        def accuracy(self, *given: Any, sizes: torch.Tensor | None, **named: Any) -> torch.Tensor:
            told.append(sizes)
            return super().accuracy(*given, **named)

    puzzle, pruner = cast(Any, Watched()), make_pruner()
    visual, everyone = puzzle.visual(range(len(puzzle))), torch.full((len(puzzle),), 3)
    module.one_shot(pruner, puzzle, torch.ones(len(puzzle)), budget=3)
    module.one_shot(pruner, puzzle, torch.ones(len(puzzle)), threshold=0.5)
    wanted = [pruner.select(visual, everyone).sizes, pruner.select_above(visual, 0.5).sizes]
    for sizes, expected in zip(told, wanted, strict=True):
        assert sizes is not None
        assert expected is not None
        torch.testing.assert_close(sizes, expected)


@pytest.mark.parametrize(("accuracy", "unpruned"), [(0.75, 1.0), (0.9, 0.5)])
def test_what_costs_just_as_much_as_is_allowed_or_gains_is_allowed(
    monkeypatch: pytest.MonkeyPatch, accuracy: float, unpruned: float
) -> None:
    monkeypatch.setattr(module, "one_shot", lambda *_, threshold: OneShot(accuracy, unpruned, kept=1.0))
    pruner = Pruner(PrunerConfig(width=8, fingerprint="abc"))
    calibrate(cast(Any, pruner), cast(Any, None), torch.ones(1), max_drop=25.0)
    assert pruner.config.threshold == THRESHOLDS[0]


@pytest.mark.parametrize(("asked", "right", "lost"), [(800, 800, 8), (800, 799, 8), (400, 394, 0), (300, 7, 3)])
def test_what_is_lost_is_told_exactly(asked: int, right: int, lost: int) -> None:
    """So that as much as is allowed is not more than that by the last bit."""

    class Losing(Puzzle):
        def accuracy(self, indices: Any, *given: Any, **named: Any) -> torch.Tensor:
            return (torch.tensor(indices) < right - lost).float()

    unpruned = (torch.arange(asked) < right).float()
    assert module.one_shot(make_pruner(), cast(Any, Losing(asked)), unpruned, 1).drop_points == 100 * lost / asked


def test_one_shot_is_at_the_threshold_given_or_else_at_the_pruners_own() -> None:
    puzzle, pruner = cast(Any, Puzzle()), make_pruner()
    unpruned = (torch.arange(len(puzzle)) < 10).float()
    kept = [module.one_shot(pruner, puzzle, unpruned, threshold=at).kept for at in (0.0, 1.0, None)]
    own = pruner.select_above(puzzle.visual(range(len(puzzle)))).keep_mask.sum(1).float().mean()
    assert kept == [COUNT, 1, pytest.approx(float(own))]
    assert 1 < own < COUNT
    assert module.one_shot(pruner, puzzle, unpruned).unpruned == 0.25


def test_a_look_after_a_stage_is_at_one_half_whatever_threshold_is_set() -> None:
    puzzle, pruner = cast(Any, Puzzle()), make_pruner()
    seen = [pipeline._look_at(pruner, puzzle, torch.ones(len(puzzle)))["kept_above_half"]]
    pruner.config = replace(pruner.config, threshold=1.0)
    seen.append(pipeline._look_at(pruner, puzzle, torch.ones(len(puzzle)))["kept_above_half"])
    assert seen[0] == seen[1] > 1
