"""FastGen's rule of effective throughput."""

from __future__ import annotations

import pytest

from experiments.promises import Promise, slowest
from scheduling.simulator.outcome import Served
from scheduling.simulator.traffic import Job


def served(first: float, gaps: list[float], prompt: int = 100) -> Served:
    times = [first]
    for gap in gaps:
        times.append(times[-1] + gap)
    job = Job("r", 0.0, prompt, len(times), len(times))
    return Served(job, first, times[-1], token_times=tuple(times))


def test_average_of_equal_gaps_is_the_gap() -> None:
    assert slowest([0.25] * 40) == pytest.approx(0.25)


def test_average_begins_like_that_of_pandas() -> None:
    keep = 1 - 2 / 17
    assert slowest([1.0, 3.0]) == pytest.approx((3.0 + keep) / (1 + keep))


def test_one_long_gap_among_many_short_ones_is_averaged_out() -> None:
    assert slowest([0.1] * 50 + [0.5] + [0.1] * 50) < 0.16


def test_a_first_token_that_is_late_breaks_the_promise() -> None:
    promise = Promise(prompt_tokens_per_s=100.0, gap=0.1)
    assert promise.kept(served(1.0, [0.05] * 10))
    assert not promise.kept(served(1.01, [0.05] * 10))


def test_slow_tokens_break_the_promise() -> None:
    promise = Promise(prompt_tokens_per_s=100.0, gap=0.1)
    assert not promise.kept(served(0.5, [0.05] * 10 + [0.3] * 10))
