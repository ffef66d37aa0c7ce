"""Confidence intervals of means, by bootstrap."""

from collections.abc import Hashable, Sequence
from statistics import fmean

import numpy as np

RESAMPLES = 2000


def bootstrap_ci95(
    values: Sequence[float], groups: Sequence[Hashable], seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of ``values``. For a paired difference, give the differences.

    Args:
        groups: of every value; values of one group, such as questions about one picture, are alike, so groups are
            drawn, each with all its values.
        seed: of the resampling; equal seeds give equal intervals.

    Raises:
        ValueError: there are no values, or not as many groups.
    """
    if not values:
        raise ValueError("a confidence interval needs at least one value")
    numbers: dict[Hashable, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        numbers.setdefault(group, []).append(value)
    sums, sizes = (np.array([part(own) for own in numbers.values()], dtype=np.float64) for part in (sum, len))
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(sums), size=len(sums)) for _ in range(resamples))
    low, high = np.quantile([sums[drawn].sum() / sizes[drawn].sum() for drawn in draws], [0.025, 0.975])
    return float(low), float(high)


def points_ci95(
    before: Sequence[float], after: Sequence[float], pictures: Sequence[str], seed: int
) -> tuple[float, list[float]]:
    """The mean of ``before - after``, scores in [0, 1], in points, and its 95 % interval, paired by question and drawn
    by picture; see ``bootstrap_ci95``."""
    differences = [one - other for one, other in zip(before, after, strict=True)]
    return 100 * fmean(differences), [100 * end for end in bootstrap_ci95(differences, pictures, seed)]
