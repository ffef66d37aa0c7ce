"""Rows from cells made up by hand."""

import pytest

from tprl.data.sample import Sample
from tprl.evaluate.cell import Cell
from tprl.evaluate.methods import Method
from tprl.evaluate.rows import quality
from tprl.evaluate.statistics import bootstrap_ci95

CELLS = {
    "unpruned": Cell([1, 1, 1, 0], [16] * 4),
    "blind": Cell([0, 1, 0, 0], [0] * 4),
    "tprl-8": Cell([1, 1, 0.5, 1], [8] * 4),
    "tprl-4": Cell([0, 0, 0, 0], [4] * 4),
    "tprl-threshold": Cell([1, 1, 1, 1], [2, 4, 6, 8]),
    "uniform-8": Cell([1, 0, 0.25, 0], [8] * 4),
    "uniform-2": Cell([1, 0, 0, 0], [2] * 4),
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
    assert quality(Method("tprl", None, None), CELLS, SAMPLES, seed=5)["kept_mean"] == 5
