"""Bootstrap intervals against a slow loop and against theory."""

import numpy as np
import pytest

from tprl.evaluate.statistics import bootstrap_ci95, points_ci95


def test_equals_a_slow_loop() -> None:
    values = [0.0, 1.0, 1.0, -1.0, 0.25]
    rng = np.random.default_rng(3)
    means = []
    for _ in range(200):
        total = 0.0
        for draw in rng.integers(5, size=5):
            total += values[draw]
        means.append(total / 5)
    means.sort()
    # NumPy's linear quantile: the value at place q (n - 1), between neighbours in proportion.
    low, high = (np.interp(q * 199, range(200), means) for q in (0.025, 0.975))
    assert bootstrap_ci95(values, range(5), 3, 200) == pytest.approx((low, high))


def test_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, 4000).tolist()
    low, high = bootstrap_ci95(values, range(4000), 0)
    assert low < 0.3 < high
    assert high - low == pytest.approx(2 * 1.96 / 4000**0.5, rel=0.05)


def test_values_of_a_group_come_and_go_together() -> None:
    """Ten copies of each value tell no more than the values themselves; by themselves they seem to."""
    values = np.random.default_rng(1).normal(size=50)
    copies, groups = np.repeat(values, 10).tolist(), np.repeat(np.arange(50), 10).tolist()
    low, high = bootstrap_ci95(copies, groups, 2)
    assert (low, high) == pytest.approx(bootstrap_ci95(values.tolist(), range(50), 2))
    alone = bootstrap_ci95(copies, range(500), 2)
    assert high - low == pytest.approx(10**0.5 * (alone[1] - alone[0]), rel=0.15)


def test_groups_of_unlike_sizes_weigh_by_their_values() -> None:
    """By hand: of the groups (0, 0, 1) and (1,), two are drawn, so the means are 1/3, 1/2 (twice) and 1."""
    means = [0.5 if one != other else (1 / 3, 1.0)[one] for one, other in map(sorted, _pairs(seed=4))]
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap_ci95([0.0, 1.0, 0.0, 1.0], ["a", "b", "a", "a"], 4, 40) == pytest.approx(tuple(expected))


def _pairs(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, size=2).tolist() for _ in range(40)]


def test_equal_values_have_no_width_and_no_values_no_interval() -> None:
    assert bootstrap_ci95([0.5] * 10, [1, 2] * 5, 1) == (0.5, 0.5)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_ci95([], [], 0)
    with pytest.raises(ValueError, match="shorter"):
        bootstrap_ci95([1.0, 0.0], ["a"], 0)


def test_a_picture_weighs_by_its_questions_in_every_draw() -> None:
    """A slow loop over many groups of unlike sizes, whose means grow with their sizes."""
    groups = [number for number in range(12) for _ in range(1 + number)]
    values = [number / 11 for number in groups]
    rng, means = np.random.default_rng(5), []
    for _ in range(100):
        drawn = [
            value for pick in rng.integers(12, size=12) for value, of in zip(values, groups, strict=True) if of == pick
        ]
        means.append(sum(drawn) / len(drawn))
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap_ci95(values, groups, 5, 100) == pytest.approx(tuple(expected))


def test_points_are_differences_of_questions_drawn_by_picture() -> None:
    rng = np.random.default_rng(0)
    before, after = (rng.integers(2, size=40).astype(float).tolist() for _ in range(2))
    pictures = [str(number // 4) for number in range(40)]
    for seed in (0, 1):
        mean, (low, high) = points_ci95(before, after, pictures, seed)
        differences = [one - other for one, other in zip(before, after, strict=True)]
        expected = bootstrap_ci95(differences, pictures, seed)
        assert mean == pytest.approx(100 * sum(differences) / 40)
        assert (low, high) == pytest.approx((100 * expected[0], 100 * expected[1]))
