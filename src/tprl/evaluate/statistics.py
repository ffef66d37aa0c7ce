"""Confidence intervals of means, by bootstrap."""

from collections.abc import Sequence
from statistics import fmean

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


def points_ci95(before: Sequence[float], after: Sequence[float], seed: int) -> tuple[float, list[float]]:
    """The mean of ``before - after``, scores in [0, 1], in points, and its 95 % interval, paired by question; see
    ``bootstrap_ci95``."""
    differences = [one - other for one, other in zip(before, after, strict=True)]
    return 100 * fmean(differences), [100 * end for end in bootstrap_ci95(differences, seed)]
