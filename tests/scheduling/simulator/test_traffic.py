from __future__ import annotations

import numpy as np
import pytest

from baton.types import LengthEstimate
from scheduling.simulator.traffic import (
    ALPACA,
    SHAREGPT,
    ClosedLoop,
    Job,
    Lengths,
    LogNormal,
    OpenLoop,
    fixed,
    gamma,
    in_out_ratio,
    make_jobs,
    noisy,
    offline,
    oracle,
    poisson,
)


@pytest.mark.parametrize("lengths", [SHAREGPT, ALPACA, in_out_ratio(53)])
def test_lengths_stay_within_their_limits_and_below_the_cap(lengths: Lengths) -> None:
    for job in make_jobs(lengths, offline, 2000, seed=1):
        assert 1 <= job.prompt_tokens <= lengths.max_prompt
        assert 1 <= job.output_tokens <= job.max_tokens
        assert job.prompt_tokens + job.max_tokens <= lengths.max_total


def test_sharegpt_lengths_have_the_published_shape() -> None:
    jobs = make_jobs(SHAREGPT, offline, 20_000, seed=2)
    assert np.mean([j.prompt_tokens for j in jobs]) == pytest.approx(139, rel=0.1)
    outputs = [j.output_tokens for j in jobs]
    assert np.mean(outputs) == pytest.approx(318, rel=0.05)
    assert np.std(outputs) / np.mean(outputs) == pytest.approx(0.9, rel=0.1)


def test_fixed_lengths_are_fixed_and_ratios_are_kept() -> None:
    alike = make_jobs(fixed(7, 9), offline, 5, seed=0)
    assert {(j.prompt_tokens, j.output_tokens) for j in alike} == {(7, 9)}
    jobs = make_jobs(in_out_ratio(4.0), offline, 5000, seed=0)
    prompts, outputs = (
        sum(j.prompt_tokens for j in jobs),
        sum(j.output_tokens for j in jobs),
    )
    assert prompts / outputs == pytest.approx(4.0, rel=0.05)


def test_lengths_that_never_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no length fits"):
        make_jobs(
            Lengths("x", LogNormal(50, 0), LogNormal(50, 0), max_total=60), offline, 1, seed=0
        )


def test_gamma_arrivals_have_the_rate_and_the_burstiness_that_was_asked_for() -> None:
    rng = np.random.default_rng(3)
    gaps = np.diff(gamma(5.0, 2.0)(rng, 50_000))
    assert 1 / gaps.mean() == pytest.approx(5.0, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(2.0, rel=0.05)
    with pytest.raises(ValueError, match="positive"):
        gamma(0.0, 1.0)


def test_rate_and_predictor_leave_the_lengths_as_they_are() -> None:
    one = make_jobs(SHAREGPT, poisson(1.0), 50, seed=4)
    other = make_jobs(SHAREGPT, poisson(9.0), 50, seed=4, estimator=noisy(0.5))
    assert [(j.prompt_tokens, j.output_tokens) for j in one] == [
        (j.prompt_tokens, j.output_tokens) for j in other
    ]
    assert one == make_jobs(SHAREGPT, poisson(1.0), 50, seed=4)
    assert one != make_jobs(SHAREGPT, poisson(1.0), 50, seed=5)


def test_the_oracle_knows_and_the_noisy_predictor_errs_by_its_sigma() -> None:
    for job in make_jobs(SHAREGPT, offline, 20, seed=0, estimator=oracle):
        assert job.estimate == LengthEstimate(job.output_tokens, job.output_tokens)
    jobs = make_jobs(SHAREGPT, offline, 20_000, seed=0, estimator=noisy(0.5))
    errors = [
        np.log(j.estimate.tokens / j.output_tokens)
        for j in jobs
        if j.estimate is not None and j.output_tokens > 20 and j.estimate.tokens < j.max_tokens
    ]
    assert np.std(errors) == pytest.approx(0.5, rel=0.05)
    assert all(
        j.estimate and j.estimate.tokens <= j.estimate.allotment <= j.max_tokens for j in jobs
    )


def test_a_request_shows_the_cap_and_not_the_truth() -> None:
    job = Job("a", 1.5, prompt_tokens=3, output_tokens=5, max_tokens=40, priority=2)
    request = job.request()
    assert len(request.prompt_ids) == 3
    assert request.stopping.max_tokens == 40
    assert (request.id, request.arrived_at, request.priority) == ("a", 1.5, 2)
    own = Job("b", 0.0, 2, 1, 1, prompt_ids=(8, 9))
    assert own.request().prompt_ids == (8, 9)


def test_an_open_loop_sorts_by_arrival_and_a_closed_one_waits_for_its_clients() -> None:
    jobs = make_jobs(fixed(4, 4), poisson(1.0), 5, seed=0)
    assert list(OpenLoop(reversed(jobs)).start()) == jobs
    closed = ClosedLoop(jobs, 2, think=0.5)
    first = list(closed.start())
    assert [j.arrived_at for j in first] == [0.0, 0.0]
    following = closed.finished(first[0], 3.0)
    assert following is not None
    assert (following.id, following.arrived_at) == (jobs[2].id, 3.5)
    assert closed.finished(first[1], 4.0) and closed.finished(following, 5.0)
    assert closed.finished(following, 6.0) is None
