from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest

from scheduling.cost import CostTracker, LinearCost
from scheduling.mlfq import Mlfq
from scheduling.order import Fcfs
from scheduling.sequence import Sequence
from scheduling.srpt import PredictedSrpt, SrptOracle
from tests.scheduling.serving import Job, advance, serve, start

COST = LinearCost(base=0.02, per_token=0.0001, per_sequence=0.0)
NEVER = Mlfq(levels=5, quantum=0.05, ratio=4.0, promote_after=math.inf)


def predicted(aging: float = 1.0, mlfq: Mlfq = NEVER) -> PredictedSrpt:
    return PredictedSrpt(mlfq, CostTracker(COST, every=0), aging=aging)


def ids(sequences: list[Sequence], policy: PredictedSrpt | SrptOracle) -> list[str]:
    return [s.request.id for s in sorted(sequences, key=policy.rank)]


def traffic(count: int, rate: float, seed: int, sigma: float = 0.5) -> list[Job]:
    """Log-normal output lengths with a mean of about 33, and estimates that are off."""
    rng, now, jobs = random.Random(seed), 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        output = min(200, 1 + round(rng.lognormvariate(3.1, 0.8)))
        estimate = max(1, round(output * rng.lognormvariate(0, sigma)))
        jobs.append(Job(now, 1 + round(rng.expovariate(0.05)), output, estimate))
    return jobs


def test_the_shortest_predicted_remaining_work_comes_first() -> None:
    policy = predicted(aging=0.0)
    sequences = [start(policy, Job(0, 1, 500, n), id=str(n)) for n in (100, 10, 50)]
    assert ids(sequences, policy) == ["10", "50", "100"]
    for token in range(60):
        advance(policy, sequences[0], 0.02, token * 0.02)
    assert ids(sequences, policy) == ["10", "100", "50"]


def test_work_that_is_still_to_be_computed_counts() -> None:
    policy = predicted(aging=0.0)
    sequences = [start(policy, Job(0, n, 500, 20), id=str(n)) for n in (5000, 50)]
    assert ids(sequences, policy) == ["50", "5000"]


def test_one_that_outlives_its_estimate_falls_back_and_sinks_at_each_doubling() -> None:
    policy = predicted(aging=0.0)
    liar = start(policy, Job(0, 1, 500, 10), id="liar")
    honest = start(policy, Job(0, 1, 500, 20), id="honest")
    levels = []
    for token in range(100):
        advance(policy, liar, 0.02, token * 0.02)
        levels.append(liar.level)
        if token == 30:
            assert ids([liar, honest], policy) == ["liar", "honest"]
    assert ids([liar, honest], policy) == ["honest", "liar"]
    sinks = [n for n, (before, after) in enumerate(pairwise(levels), 1) if after > before]
    assert sinks == [10, 20, 40, 80]


def test_what_may_still_come_is_never_more_than_the_request_allows() -> None:
    policy = predicted(aging=0.0)
    capped = start(policy, Job(0, 1, 30, 400), id="capped")
    other = start(policy, Job(0, 1, 500, 40), id="other")
    assert ids([other, capped], policy) == ["capped", "other"]


def test_without_an_estimate_a_request_counts_as_the_mean_of_those_that_have_one() -> None:
    policy = predicted(aging=0.0)
    sequences = [start(policy, Job(0, 1, 500, n), id=str(n)) for n in (100, 100, 20, 200)]
    sequences.append(start(policy, Job(0, 1, 500), id="unknown"))
    assert ids(sequences, policy) == ["20", "100", "100", "unknown", "200"]


def test_age_counts_beside_work_and_more_so_with_a_larger_knob() -> None:
    def overtaken_after(knob: float) -> float:
        policy = predicted(aging=knob)
        long = start(policy, Job(0, 1, 500, 100), id="long")
        gaps = [n / 10 for n in range(1, 200)]
        shorts = [start(policy, Job(0, 1, 500, 10), now=g, id=f"s{g:05.1f}") for g in gaps]
        order = ids([long, *shorts], policy)
        return order.index("long") / 10

    assert overtaken_after(0.0) > overtaken_after(0.5) > overtaken_after(2.0) > 0


def test_age_counts_less_the_longer_the_queue_is() -> None:
    def mean_aging(rate: float) -> float:
        policy, seen = predicted(), list[float]()
        serve(policy, traffic(300, rate, 1), COST, watch=lambda _, now: seen.append(policy.aging))
        return sum(seen) / len(seen)

    assert mean_aging(0.5) > mean_aging(1.5) > mean_aging(3.0) > 0


def test_predictions_that_are_off_by_half_come_close_to_the_oracle_and_far_from_fcfs() -> None:
    means = {"fcfs": 0.0, "predicted": 0.0, "oracle": 0.0}
    for seed in range(3):
        jobs = traffic(600, 1.3, seed)
        true = [Job(j.arrives, j.prompt, j.output, j.output) for j in jobs]
        oracle = SrptOracle(CostTracker(COST, every=0))
        means["fcfs"] += serve(Fcfs(), jobs, COST).mean_latency(jobs)
        means["predicted"] += serve(predicted(), jobs, COST).mean_latency(jobs)
        means["oracle"] += serve(oracle, true, COST).mean_latency(jobs)
    assert means["predicted"] < 1.3 * means["oracle"]
    assert means["predicted"] < 0.7 * means["fcfs"]


def test_the_oracle_takes_estimates_for_the_truth() -> None:
    oracle = SrptOracle(CostTracker(COST, every=0))
    short = start(oracle, Job(0, 1, 500, 30), id="short")
    long = start(oracle, Job(0, 1, 500, 40), id="long")
    for token in range(35):
        advance(oracle, long, 0.02, token * 0.02)
    oracle.promote([short, long], now=1e6)
    assert ids([short, long], oracle) == ["long", "short"]


def test_next_run_adds_up_the_work_of_those_before() -> None:
    policy = predicted(aging=0.0)
    ranked = [start(policy, Job(0, 1, 500, n), id=str(n)) for n in (10, 20, 30)]
    assert policy.next_run(ranked, 1, now=0.0) == pytest.approx([0.0, 0.2, 0.6])
    assert policy.next_run(ranked, 2, now=0.0)[:2] == [0.0, 0.0]


def test_next_run_is_when_it_counts_as_starved_if_that_is_sooner() -> None:
    policy = predicted(mlfq=Mlfq(promote_after=2.0))
    ranked = [start(policy, Job(0, 1, 900, n), id=str(n)) for n in (500, 600)]
    assert policy.next_run(ranked, 1, now=1.5) == [0.0, 0.5]


def test_steady_ends_before_one_that_outlives_its_estimate_falls_behind() -> None:
    policy = predicted(aging=0.0)
    liar = start(policy, Job(0, 1, 500, 10), id="liar")
    honest = start(policy, Job(0, 1, 500, 50), id="honest")
    assert policy.steady([liar], [], 0.0, pass_seconds=1.0) == 0.0  # has not looked at the load
    policy.promote([liar, honest], now=0.0)
    assert policy.steady([liar], [honest], 0.0, pass_seconds=1e-6) * 1e6 == pytest.approx(200)
