"""Spans in which a device works, and what lies between them."""

from __future__ import annotations

import pytest

from benchmarks.gpu.timing import covered, waiting

_MICRO = 1e-6


@pytest.mark.parametrize(
    ("spans", "length"),
    [
        ([], 0.0),
        ([(1.0, 3.0)], 2.0),
        ([(5.0, 6.0), (1.0, 3.0)], 3.0),
        ([(1.0, 4.0), (2.0, 3.0)], 3.0),
        ([(1.0, 3.0), (2.0, 5.0), (5.0, 6.0)], 5.0),
    ],
)
def test_what_overlaps_counts_once(spans: list[tuple[float, float]], length: float) -> None:
    assert covered(spans) == pytest.approx(length)


def test_short_gaps_are_closed_and_long_ones_are_not() -> None:
    spans = [(0.0, 1.0), (1.5, 2.0), (4.0, 5.0)]
    assert covered(spans, joined=0.5) == pytest.approx(3.0)
    assert covered(spans, joined=0.4) == pytest.approx(2.5)


def test_only_long_gaps_are_the_hosts() -> None:
    # Ten kernels of 9 us with 1 us between them, 10 us without any, and the same again.
    run = [(10 * i * _MICRO, (10 * i + 9) * _MICRO) for i in range(10)]
    again = [(begin + 109 * _MICRO, end + 109 * _MICRO) for begin, end in run]
    found = waiting(again + run)
    assert found.idle == pytest.approx(28 / 208)
    assert found.host == pytest.approx(10 / 208)
