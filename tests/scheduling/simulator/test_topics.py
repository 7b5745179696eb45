"""Traffic whose prompts tell how long the outputs will be."""

from __future__ import annotations

import math
import statistics

import pytest

from scheduling.length import LengthPredictor, PredictorSettings
from scheduling.length_buckets import Buckets
from scheduling.simulator.topics import Topics, with_learned_estimates
from scheduling.simulator.traffic import Job, Lengths, LogNormal, poisson

FEW = Topics(0.9, topics=20, words=10)


def predictor() -> LengthPredictor:
    return LengthPredictor(PredictorSettings(Buckets.geometric(2048)))


def error(jobs: list[Job]) -> float:
    """Standard deviation of the logarithm of predicted over true length."""
    pairs = [(job.estimate, job.output_tokens) for job in jobs]
    return statistics.pstdev(math.log(e.tokens / n) for e, n in pairs if e is not None)


def test_the_same_seed_gives_the_same_jobs_at_any_rate() -> None:
    slow, fast = (FEW.jobs(poisson(rate), 50, seed=3) for rate in (1.0, 9.0))
    assert [j.prompt_ids for j in slow] == [j.prompt_ids for j in fast]
    assert [j.output_tokens for j in slow] == [j.output_tokens for j in fast]
    assert slow[-1].arrived_at > fast[-1].arrived_at
    assert [j.prompt_ids for j in FEW.jobs(poisson(1.0), 50, seed=4)] != [
        j.prompt_ids for j in slow
    ]


def test_lengths_keep_to_the_limits_and_to_the_distribution() -> None:
    wide = Lengths("wide", LogNormal(60, 1.0), LogNormal(200, 1.0), 4096, 16384)
    jobs = Topics(0.5, wide).jobs(poisson(1.0), 4000, seed=1)
    assert all(j.prompt_tokens == len(j.prompt_ids or ()) for j in jobs)
    assert all(j.prompt_tokens + j.output_tokens <= 16384 for j in jobs)
    assert all(1 <= j.output_tokens <= j.max_tokens for j in jobs)
    assert statistics.mean(j.output_tokens for j in jobs) == pytest.approx(200, rel=0.1)
    logs = [math.log(j.output_tokens) for j in jobs]
    assert statistics.pstdev(logs) == pytest.approx(math.sqrt(math.log(2)), rel=0.1)


def test_a_limit_on_the_output_cuts_it() -> None:
    cut = Lengths("cut", LogNormal(60, 1.0), LogNormal(200, 1.0), max_tokens=100)
    jobs = Topics(0.5, cut).jobs(poisson(1.0), 200, seed=1)
    assert {j.max_tokens for j in jobs} == {100}
    assert max(j.output_tokens for j in jobs) == 100


def test_the_topic_explains_its_share_of_the_length() -> None:
    assert Topics(1.0).sigma == 0
    assert Topics(0.0).sigma == pytest.approx(math.sqrt(math.log(1 + 1.1**2)))
    with pytest.raises(ValueError, match="predictability"):
        Topics(1.5)


def test_a_predictor_learns_what_there_is_to_learn_and_no_more() -> None:
    found = {}
    for predictability in (0.0, 0.9):
        topics = Topics(predictability, topics=20, words=10)
        jobs = with_learned_estimates(topics.jobs(poisson(1.0), 2500, seed=5), predictor())
        found[predictability] = error(jobs[1500:])
        assert found[predictability] > 0.9 * topics.sigma
    assert found[0.9] < 0.65 * found[0.0]


def test_estimates_are_made_before_their_lengths_are_seen() -> None:
    jobs = FEW.jobs(poisson(1.0), 60, seed=6)
    first = with_learned_estimates(jobs, predictor())
    assert all(job.estimate is None for job in first[:32])
    assert all(job.estimate is not None for job in first[32:])
    late = with_learned_estimates(jobs, predictor(), behind=20)
    assert all(job.estimate is None for job in late[:52])
    assert all(job.estimate is not None for job in late[52:])


def test_jobs_without_a_prompt_are_refused() -> None:
    job = Job("a", 0.0, 3, 4, 10)
    with pytest.raises(ValueError, match="no prompt ids"):
        with_learned_estimates([job], predictor())
