"""Means over seeds, and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Two-sided 95% points of Student's t for 1, 2, 3, ... degrees of freedom.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over `count` seeds with its 95% confidence interval."""

    mean: float
    low: float
    high: float
    count: int


def student_t95(freedom: int) -> float:
    """The two-sided 95% point of Student's t; beyond 30 degrees of freedom to within 0.001."""
    return _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.45 / freedom


def interval(values: Sequence[float]) -> Interval:
    """Mean of one value per seed, with Student's t. One seed tells nothing of the spread: its
    interval is the value itself. Raises ValueError without values."""
    if not values:
        raise ValueError("no values")
    found = np.asarray(values, float)
    mean, count = float(found.mean()), len(found)
    if count == 1:
        return Interval(mean, mean, mean, 1)
    half = student_t95(count - 1) * float(found.std(ddof=1)) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def ratio(over: Sequence[float], under: Sequence[float]) -> Interval:
    """Ratio of two means over the same seeds (paired), by the jackknife: what two policies made
    of the same jobs varies together, so the ratio is surer than either mean.

    Raises ValueError if the numbers of seeds differ or are zero.
    """
    if len(over) != len(under) or not over:
        raise ValueError("a ratio needs the same seeds on both sides")
    above, below = np.asarray(over, float), np.asarray(under, float)
    mean, count = float(above.sum() / below.sum()), len(above)
    if count == 1:
        return Interval(mean, mean, mean, 1)
    without = (above.sum() - above) / (below.sum() - below)
    error = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    half = student_t95(count - 1) * error
    return Interval(mean, mean - half, mean + half, count)
