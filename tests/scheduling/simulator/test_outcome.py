from __future__ import annotations

import pytest

from scheduling.simulator.outcome import Outcome, Served
from scheduling.simulator.traffic import Job


def _served(arrived: float, first: float, end: float, output: int, **rest: object) -> Served:
    return Served(Job(f"{arrived}", arrived, 10, output, 100), first, end, **rest)  # type: ignore[arg-type]


def _outcome(*served: Served, makespan: float = 10.0) -> Outcome:
    return Outcome(served, makespan, steps=5, busy_seconds=4.0)


def test_a_job_is_timed_from_its_arrival() -> None:
    served = _served(1.0, 3.0, 7.0, 5)
    assert served.completion == 6.0
    assert served.to_first_token == 2.0
    assert served.per_output_token == 1.0
    assert served.normalized == pytest.approx(1.2)
    assert _served(1.0, 3.0, 3.0, 1).per_output_token == 0.0


def test_the_run_is_summed_up_over_its_jobs() -> None:
    outcome = _outcome(_served(0.0, 1.0, 2.0, 2), _served(0.0, 5.0, 8.0, 4))
    assert outcome.mean_completion() == 5.0
    assert outcome.completion_percentile(50) == 5.0
    assert outcome.mean_normalized() == pytest.approx(1.5)
    assert outcome.throughput() == pytest.approx(0.6)
    assert outcome.attained(ttft=2.0) == 0.5
    assert outcome.attained(ttft=6.0, tpot=1.0) == 1.0
    assert outcome.goodput(tpot=0.9) == 0.0


def test_the_warm_up_is_dropped_by_arrival() -> None:
    late = [_served(float(i), 20.0, 20.0 + i, 2) for i in range(10)]
    kept = _outcome(*reversed(late)).after_warmup(0.1).served
    assert [s.job.arrived_at for s in kept] == [float(i) for i in range(1, 10)]


def test_gaps_are_those_within_jobs_and_need_token_times() -> None:
    outcome = _outcome(
        _served(0.0, 1.0, 4.0, 3, token_times=(1.0, 2.0, 4.0)),
        _served(0.0, 9.0, 9.0, 1, token_times=(9.0,)),
    )
    assert outcome.gaps().tolist() == [1.0, 2.0]
    assert outcome.gap_percentile(50) == 1.5
    with pytest.raises(ValueError, match="no token times"):
        _outcome(_served(0.0, 1.0, 4.0, 3)).gaps()


def test_the_steady_rate_counts_the_middle_of_the_completions() -> None:
    ends = [float(i) for i in range(100)] + [1000.0] * 5
    outcome = _outcome(*(_served(0.0, 0.0, end, 2) for end in ends))
    assert outcome.completion_rate() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="too few"):
        _outcome().completion_rate()
