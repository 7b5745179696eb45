from __future__ import annotations

from dataclasses import replace

import pytest

from baton.errors import ConfigError
from baton.types import LengthEstimate
from scheduling.simulator.traces import at_rate, job_line, read_jobs
from scheduling.simulator.traffic import SHAREGPT, make_jobs, noisy, poisson


def test_jobs_are_the_same_after_a_file() -> None:
    jobs = make_jobs(SHAREGPT, poisson(2.0), 30, seed=1, estimator=noisy(0.5), tenants=("a", "b"))
    start = jobs[0].arrived_at
    again = read_jobs(job_line(replace(job, priority=1)) for job in reversed(jobs))
    for before, after in zip(jobs, again, strict=True):
        assert after.arrived_at == pytest.approx(before.arrived_at - start)
        assert replace(after, arrived_at=0.0) == replace(before, arrived_at=0.0, priority=1)


def test_the_mooncake_form_is_read() -> None:
    lines = [
        '{"timestamp": 3000, "input_length": 50, "output_length": 7, "hash_ids": [1, 2]}',
        "",
        '{"timestamp": 1500, "input_length": 20, "output_length": 0}',
    ]
    first, second = read_jobs(lines)
    assert (first.arrived_at, first.prompt_tokens, first.output_tokens) == (0.0, 20, 1)
    assert (second.arrived_at, second.prompt_tokens, second.output_tokens) == (1.5, 50, 7)
    assert first.max_tokens == second.max_tokens == 14
    assert read_jobs(lines, max_tokens=99)[0].max_tokens == 99


def test_optional_fields_count() -> None:
    line = (
        '{"arrived_at": 1, "prompt_tokens": 2, "output_tokens": 3, "max_tokens": 9, '
        '"estimate": [4, 5]}'
    )
    (job,) = read_jobs([line])
    assert (job.max_tokens, job.estimate) == (9, LengthEstimate(4, 5))


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["nonsense"],
        ["[1]"],
        ['{"arrived_at": 0, "prompt_tokens": 0, "output_tokens": 1}'],
        ['{"arrived_at": NaN, "prompt_tokens": 1, "output_tokens": 1}'],
        ['{"timestamp": 0, "input_length": 5}'],
    ],
)
def test_what_is_no_trace_is_refused(lines: list[str]) -> None:
    with pytest.raises(ConfigError, match="trace"):
        read_jobs(lines)


def test_a_trace_can_be_stretched_to_another_rate() -> None:
    jobs = make_jobs(SHAREGPT, poisson(2.0), 100, seed=1)
    faster = at_rate(jobs, 8.0)
    assert 99 / (faster[-1].arrived_at - faster[0].arrived_at) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="at once"):
        at_rate(jobs[:1], 1.0)
