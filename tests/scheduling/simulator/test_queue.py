"""The queue of a simulated cluster; tests/queueing compares its order with the real one's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from baton.types import LengthEstimate
from scheduling.cost import CostTracker, LinearCost
from scheduling.mlfq import Mlfq
from scheduling.order import Policy, make_policy
from scheduling.plan import Capacity
from scheduling.simulator.cluster import ClusterSpec, simulate_cluster
from scheduling.simulator.queue import QueueOrder, WaitingQueue
from scheduling.simulator.traffic import Job, fixed, make_jobs, offline, poisson
from scheduling.simulator.worker import WorkerSpec

COST = LinearCost(base=0.01, per_token=0.001, per_sequence=0.001)


def _fcfs(cost: CostTracker) -> Policy:
    return make_policy("fcfs", cost=cost)


WORKER = WorkerSpec(Capacity(4000, 16, 512, 8, 2048), COST, _fcfs)
ORDER = QueueOrder("skip-join-mlfq", Mlfq(quantum=0.05, ratio=2), COST, COST)


def _drain(queue: WaitingQueue, now: float) -> list[str]:
    out = []
    while (job := queue.first(now)) is not None:
        queue.claim(job)
        out.append(job.id)
    return out


def test_it_goes_by_priority_level_and_arrival() -> None:
    queue = WaitingQueue(ORDER)
    short, long = 10, 1000
    for job in (
        Job("long", 0.0, long, 5, 50, estimate=LengthEstimate(5, 5)),
        Job("first", 1.0, short, 5, 50),
        Job("second", 2.0, short, 5, 50),
        Job("urgent", 3.0, long, 5, 50, priority=1),
    ):
        queue.push(job)
    assert _drain(queue, 3.0) == ["urgent", "first", "second", "long"]


def test_who_came_too_long_ago_is_lifted_by_a_timer() -> None:
    queue = WaitingQueue(ORDER)
    queue.push(Job("old", 0.0, 1000, 5, 50))
    queue.push(Job("young", 4.0, 10, 5, 50))
    assert (queue.tick(4.9), queue.level(Job("old", 0.0, 1000, 5, 50)) > 0) == ([], True)
    queue.tick(5.2)
    assert _drain(queue, 5.2) == ["old", "young"]


def test_a_job_that_waits_past_its_deadline_is_rejected() -> None:
    jobs = [Job(f"r{i}", 0.0, 100, 50, 50) for i in range(30)]
    late = Job("late", 0.1, 100, 50, 50, deadline=0.4)
    outcome = simulate_cluster([*jobs, late], ClusterSpec(WORKER, ahead_sequences=0))
    assert outcome.rejected == 1
    assert "late" not in {served.job.id for served in outcome.served}


@pytest.mark.parametrize("helpers", [0, 1])
def test_lanes_keep_a_flood_of_one_tenant_from_the_ttft_of_another(helpers: int) -> None:
    lengths = fixed(60, 40, cv=0.5)
    shape = ClusterSpec(WORKER, 2, WORKER if helpers else None, helpers, ahead_sequences=2)
    backlog = make_jobs(lengths, offline, 300, seed=9)
    share = simulate_cluster(backlog, shape).completion_rate() / 2
    flood = make_jobs(lengths, poisson(5 * share), 1000, seed=1, tenants=("flood",))
    calm = [
        replace(job, id=f"calm-{job.id}")
        for job in make_jobs(lengths, poisson(0.5 * share), 100, seed=2, tenants=("calm",))
    ]

    def p95(lanes: bool) -> float:
        spec = replace(shape, queue=QueueOrder("fcfs", lanes=lanes))
        served = simulate_cluster([*flood, *calm], spec).served
        return float(
            np.percentile([s.to_first_token for s in served if s.job.tenant == "calm"], 95)
        )

    with_lanes, without = p95(True), p95(False)
    assert with_lanes * 5 < without
