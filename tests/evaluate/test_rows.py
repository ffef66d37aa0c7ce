"""Rows from cells made up by hand."""

from dataclasses import replace

import pytest

from tprl.data.sample import Sample
from tprl.evaluate.cell import Cell
from tprl.evaluate.methods import Method
from tprl.evaluate.rows import per_family, quality
from tprl.evaluate.statistics import bootstrap_ci95

CELLS = {
    "unpruned": Cell([1, 1, 1, 0], [16] * 4),
    "blind": Cell([0, 1, 0, 0], [0] * 4),
    "tprl-8": Cell([1, 1, 0.5, 1], [8] * 4),
    "tprl-4": Cell([0, 0, 0, 0], [4] * 4),
    "tprl-threshold": Cell([1, 0, 0.5, 1], [2, 4, 6, 8]),
    "uniform-8": Cell([1, 0, 0.25, 0], [8] * 4),
    "uniform-2": Cell([1, 0, 0, 0], [2, 2, 1, 1]),
}


SAMPLES = [Sample(str(i), picture, "?", ("a",), "all", None) for i, picture in enumerate("aabc")]


def test_a_peer_is_paired_with_the_unpruned_model_and_with_tprl_under_the_same_budget() -> None:
    row = quality(Method("uniform", None, 8), CELLS, SAMPLES, seed=5)
    assert (row["accuracy"], row["accuracy_unpruned"], row["accuracy_blind"]) == (0.3125, 0.75, 0.25)
    assert (row["drop_points"], row["behind_tprl_points"]) == (43.75, 56.25)
    assert row["drop_ci95"] == pytest.approx([100 * end for end in bootstrap_ci95([0, 1, 0.75, 0], "aabc", 5)])
    assert row["behind_tprl_ci95"] == pytest.approx([100 * end for end in bootstrap_ci95([0, 1, 0.25, 1], "aabc", 5)])


@pytest.mark.parametrize("method", [Method("tprl", None, 8), Method("tprl", None, None), Method("uniform", None, 2)])
def test_tprl_itself_and_a_budget_without_it_are_paired_with_nothing(method: Method) -> None:
    row = quality(method, CELLS, SAMPLES, seed=5)
    assert row["behind_tprl_points"] is None
    assert row["behind_tprl_ci95"] is None


def test_kept_tokens_are_a_mean_over_questions() -> None:
    for name, budget, kept in (("tprl", None, 5), ("uniform", 2, 1.5)):
        row = quality(Method(name, None, budget), CELLS, SAMPLES, seed=5)
        assert (row["method"], row["budget"], row["kept_mean"]) == (name, budget, kept)


def test_kinds_of_questions_are_told_apart() -> None:
    samples = [replace(sample, family=family) for sample, family in zip(SAMPLES, ("word", "box") * 2, strict=True)]
    found = per_family(Method("tprl", None, None), CELLS, samples)
    names = ("accuracy", "accuracy_unpruned", "accuracy_blind", "n", "kept_mean")
    assert list(found.items()) == [
        ("box", dict(zip(names, (0.5, 0.5, 0.5, 2, 6), strict=True))),
        ("word", dict(zip(names, (0.75, 1, 0, 2, 4), strict=True))),
    ]


def test_intervals_are_drawn_by_the_seed() -> None:
    scores = [number / 40 for number in range(40)]
    cells = {
        "unpruned": Cell([1] * 40, [16] * 40),
        "blind": Cell([0] * 40, [0] * 40),
        "tprl-8": Cell([1] * 40, [8] * 40),
    }
    samples = [replace(SAMPLES[0], image_id=str(number)) for number in range(40)]
    row = quality(Method("uniform", None, 8), {**cells, "uniform-8": Cell(scores, [8] * 40)}, samples, seed=6)
    drawn = [100 * end for end in bootstrap_ci95([1 - score for score in scores], range(40), 6)]
    assert row["drop_ci95"] == pytest.approx(drawn)
    assert row["behind_tprl_ci95"] == pytest.approx(drawn)
