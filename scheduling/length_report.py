"""How good length predictions are: each request is judged by what was said before it ran."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 10
_FIGURES = 9
TALLIES = _FIGURES + 3 * BINS
"""Numbers that a report is made from."""


@dataclass(frozen=True, slots=True)
class LengthReport:
    """Averages over recent requests, the latest weighing most.

    `accuracy` is the share of outputs whose bucket was the most likely one; it means nothing
    without `majority_accuracy`, the same for whoever always names the most frequent bucket (S3's
    98% on Alpaca is about that). `error_tokens` and `error_buckets` are mean absolute errors, and
    `majority_error_tokens` that of always naming the mean length. `calibration_error` is the
    expected calibration error: how far the probability of the named bucket is from its accuracy.
    `exceeded` is the share of outputs longer than their allotment, `reserved` the mean ratio of
    all allotments to all outputs. `seen` counts all sequences ever learnt from, `weight` those
    that the averages stand on.
    """

    seen: int
    weight: float
    accuracy: float
    majority_accuracy: float
    error_tokens: float
    majority_error_tokens: float
    error_buckets: float
    calibration_error: float
    exceeded: float
    reserved: float


@dataclass(frozen=True, slots=True)
class Judged:
    """One prediction beside the truth."""

    bucket: int
    named: int
    majority: int
    confidence: float
    tokens: int
    expected: float
    mean: float
    allotment: int

    def tally(self) -> NDArray[np.float64]:
        """What it adds to the tallies."""
        hit = self.named == self.bucket
        tally = np.zeros(TALLIES)
        tally[:_FIGURES] = (
            1.0,
            hit,
            self.majority == self.bucket,
            abs(self.expected - self.tokens),
            abs(self.mean - self.tokens),
            abs(self.named - self.bucket),
            self.tokens > self.allotment,
            self.allotment,
            self.tokens,
        )
        bin_ = _FIGURES + 3 * min(BINS - 1, int(self.confidence * BINS))
        tally[bin_ : bin_ + 3] = (1.0, hit, self.confidence)
        return tally


def report(tallies: NDArray[np.float64], seen: int) -> LengthReport | None:
    """Averages of summed tallies; None while there are none."""
    weight = float(tallies[0])
    if weight <= 0:
        return None
    figures = (tallies[1 : _FIGURES - 2] / weight).tolist()
    bins = tallies[_FIGURES:].reshape(BINS, 3)
    calibration = float(np.abs(bins[:, 1] - bins[:, 2]).sum()) / weight
    accuracy, majority, error, mean_error, bucket_error, exceeded = figures
    return LengthReport(
        seen=seen,
        weight=weight,
        accuracy=accuracy,
        majority_accuracy=majority,
        error_tokens=error,
        majority_error_tokens=mean_error,
        error_buckets=bucket_error,
        calibration_error=calibration,
        exceeded=exceeded,
        reserved=float(tallies[7] / max(tallies[8], 1e-9)),
    )
