"""Confidence intervals of means, by bootstrap."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000


def bootstrap_ci95(values: Sequence[float], seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of ``values``. For a paired difference, give the differences.

    Args:
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("a confidence interval needs at least one value")
    numbers = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [numbers[rng.integers(len(numbers), size=len(numbers))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
