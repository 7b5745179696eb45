from __future__ import annotations

from dataclasses import replace

import pytest

from scheduling.cost import CostTracker, LinearCost
from scheduling.order import Policy, make_policy
from scheduling.plan import Capacity
from scheduling.simulator.cluster import ClusterSpec, simulate_cluster
from scheduling.simulator.engine import simulate
from scheduling.simulator.prefill_worker import Transfer
from scheduling.simulator.traffic import (
    SHAREGPT,
    ClosedLoop,
    Job,
    fixed,
    make_jobs,
    offline,
    oracle,
    poisson,
)
from scheduling.simulator.worker import WorkerSpec

COST = LinearCost(base=0.01, per_token=0.001, per_sequence=0.001)
ALONE = 1_000_000  # sequences ahead: everything is sent at once


def _fcfs(cost: CostTracker) -> Policy:
    return make_policy("fcfs", cost=cost)


WORKER = WorkerSpec(Capacity(4000, 16, 512, 8, 2048), COST, _fcfs)


def test_a_cluster_of_one_worker_is_that_worker() -> None:
    jobs = make_jobs(SHAREGPT, poisson(3.0), 80, seed=1)
    alone = simulate(jobs, WORKER, keep_token_times=True)
    cluster = simulate_cluster(
        jobs, ClusterSpec(WORKER, ahead_sequences=ALONE), keep_token_times=True
    )
    assert cluster == alone


def test_the_first_token_comes_with_the_prefill_and_the_second_after_the_transfer() -> None:
    transfer = Transfer(block_bytes=100, bytes_per_second=1000, latency=0.5)
    spec = ClusterSpec(WORKER, 1, WORKER, 1, transfer)
    outcome = simulate_cluster([Job("a", 1.0, 20, 3, 50)], spec, keep_token_times=True)
    (served,) = outcome.served
    first = 1.0 + 0.01 + 20 * 0.001
    second = first + 2 * 0.1 + 0.5 + 0.011  # two blocks on the link, then a pass of one token
    assert served.token_times == pytest.approx((first, second, second + 0.011))
    assert served.first_token_at == pytest.approx(first)


def test_kv_is_sent_while_later_chunks_are_computed() -> None:
    prompt, slow = 1024, Transfer(block_bytes=1, bytes_per_second=100)  # 64 blocks: 0.64 s
    small = replace(WORKER, capacity=replace(WORKER.capacity, max_tokens=512))
    whole = replace(WORKER, capacity=replace(WORKER.capacity, max_tokens=1024))
    job = Job("a", 0.0, prompt, 2, 50)
    split, at_once = (
        simulate_cluster([job], ClusterSpec(WORKER, 1, prefill, 1, slow)).makespan
        for prefill in (small, whole)
    )
    assert split < at_once


def test_a_job_of_one_token_never_reaches_the_decode_worker() -> None:
    spec = ClusterSpec(WORKER, 1, WORKER, 1)
    outcome = simulate_cluster([Job("a", 0.0, 20, 1, 50), Job("b", 0.0, 20, 1, 1)], spec)
    assert len(outcome.served) == 2
    assert outcome.steps == 1


@pytest.mark.parametrize("routing", ["round-robin", "least-outstanding", "kv-aware"])
@pytest.mark.parametrize("prefill_workers", [0, 2])
def test_every_job_is_served_in_any_shape(routing: str, prefill_workers: int) -> None:
    jobs = make_jobs(SHAREGPT, poisson(12.0), 150, seed=2, estimator=oracle)
    prefill = WORKER if prefill_workers else None
    spec = ClusterSpec(WORKER, 3, prefill, prefill_workers, routing=routing)
    outcome = simulate_cluster(jobs, spec)
    assert sorted(s.job.id for s in outcome.served) == [j.id for j in jobs]
    assert outcome == simulate_cluster(jobs, spec)


def test_two_workers_take_half_the_time_of_one() -> None:
    jobs = make_jobs(fixed(50, 50), offline, 200, seed=0)
    one = simulate_cluster(jobs, ClusterSpec(WORKER, 1)).makespan
    two = simulate_cluster(jobs, ClusterSpec(WORKER, 2)).makespan
    assert one / two == pytest.approx(2.0, rel=0.05)


def test_memory_that_is_short_holds_jobs_in_the_queue_and_loses_none() -> None:
    tight = replace(WORKER, capacity=replace(WORKER.capacity, blocks=30))
    jobs = make_jobs(fixed(60, 60), offline, 30, seed=0)
    outcome = simulate_cluster(jobs, ClusterSpec(tight, 2, WORKER, 1))
    assert len(outcome.served) == 30
    assert outcome.peak_kv_tokens <= 30 * 16


def test_what_fits_no_worker_is_rejected() -> None:
    jobs = [Job("big", 0.0, 3000, 10, 10), Job("a", 0.0, 10, 3, 50)]
    outcome = simulate_cluster(jobs, ClusterSpec(WORKER, 1, WORKER, 1))
    assert (outcome.rejected, [s.job.id for s in outcome.served]) == (1, ["a"])


def test_a_closed_loop_goes_through_a_cluster() -> None:
    jobs = make_jobs(fixed(20, 5), offline, 20, seed=0)
    outcome = simulate_cluster(ClosedLoop(jobs, 4), ClusterSpec(WORKER, 2, WORKER, 1))
    assert len(outcome.served) == 20


def test_a_spec_needs_decode_workers_and_prefill_workers_their_own() -> None:
    with pytest.raises(ValueError, match="needs decode workers"):
        ClusterSpec(WORKER, 0)
    with pytest.raises(ValueError, match="spec for prefill"):
        ClusterSpec(WORKER, 1, None, 2)
