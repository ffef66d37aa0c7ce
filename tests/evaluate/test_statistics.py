"""Bootstrap intervals against a slow loop and against theory."""

import numpy as np
import pytest

from tprl.evaluate.statistics import bootstrap_ci95


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
    assert bootstrap_ci95(values, 3, 200) == pytest.approx((low, high))


def test_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, 4000).tolist()
    low, high = bootstrap_ci95(values, 0)
    assert low < 0.3 < high
    assert high - low == pytest.approx(2 * 1.96 / 4000**0.5, rel=0.05)


def test_equal_values_have_no_width_and_no_values_no_interval() -> None:
    assert bootstrap_ci95([0.5] * 10, 1) == (0.5, 0.5)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_ci95([], 0)
