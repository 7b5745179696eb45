"""Strides are for speed alone: the outcome is that of one pass at a time."""

from __future__ import annotations

import math

import pytest

from scheduling.cost import CostTracker, LinearCost
from scheduling.mlfq import Mlfq
from scheduling.order import NAMES, Policy, make_policy
from scheduling.plan import Capacity
from scheduling.rules import Rules
from scheduling.simulator.cluster import ClusterSpec, simulate_cluster
from scheduling.simulator.engine import simulate
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.prefill_worker import Transfer
from scheduling.simulator.traffic import Lengths, LogNormal, make_jobs, noisy, poisson
from scheduling.simulator.worker import WorkerSpec

COST = LinearCost(base=0.01, per_token=2e-4, per_sequence=1e-4, per_context=1e-6)
TENANTS = ("a", "b", "c")
LENGTHS = Lengths("test", LogNormal(60, 1.0), LogNormal(120, 1.0), max_prompt=300, max_total=800)


def _spec(policy: str, rules: Rules, blocks: int) -> WorkerSpec:
    def build(cost: CostTracker) -> Policy:
        levels = Mlfq(levels=8, quantum=0.02, ratio=2, promote_after=3.0)
        return make_policy(policy, mlfq=levels, cost=cost)

    host = 400 if rules.preemption == "swap" else 0
    capacity = Capacity(blocks, 16, 256, 8, 800, host_blocks=host)
    return WorkerSpec(capacity, COST, build, rules, swap_seconds_per_block=0.0005)


def _assert_alike(one: Outcome, other: Outcome) -> None:
    assert one.steps == other.steps
    assert one.peak_kv_tokens == other.peak_kv_tokens
    assert one.tally == other.tally
    assert one.busy_seconds == pytest.approx(other.busy_seconds)
    pairs = zip(
        sorted(one.served, key=lambda s: s.job.id),
        sorted(other.served, key=lambda s: s.job.id),
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.job == theirs.job
        assert mine.preemptions == theirs.preemptions
        assert mine.token_times == pytest.approx(theirs.token_times, abs=1e-9)


@pytest.mark.parametrize(
    "rules",
    [
        Rules(),
        Rules(preemption="swap"),
        Rules(preemption="swap", swapping="reactive"),
        Rules(admission="reserve-predicted"),
        Rules(admission="reserve-max"),
        Rules(batching="prefill-first"),
        Rules(filling="static"),
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", [120, 4000])
@pytest.mark.parametrize("policy", NAMES)
def test_one_engine(policy: str, blocks: int, rules: Rules) -> None:
    jobs = make_jobs(LENGTHS, poisson(5.0), 60, seed=1, estimator=noisy(0.5))
    spec = _spec(policy, rules, blocks)
    fast = simulate(jobs, spec, keep_token_times=True)
    slow = simulate(jobs, spec, keep_token_times=True, strides=False)
    _assert_alike(fast, slow)


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("blocks", [120, 4000])
def test_an_engine_that_tenants_share(policy: str, blocks: int) -> None:
    jobs = make_jobs(LENGTHS, poisson(5.0), 60, seed=1, estimator=noisy(0.5), tenants=TENANTS)
    spec = _spec(policy, Rules(), blocks)
    fast = simulate(jobs, spec, keep_token_times=True)
    slow = simulate(jobs, spec, keep_token_times=True, strides=False)
    _assert_alike(fast, slow)


@pytest.mark.parametrize("tenants", [("",), TENANTS])
@pytest.mark.parametrize("prefill_workers", [0, 1])
def test_a_cluster(prefill_workers: int, tenants: tuple[str, ...]) -> None:
    jobs = make_jobs(LENGTHS, poisson(12.0), 120, seed=1, tenants=tenants)
    worker = _spec("skip-join-mlfq", Rules(), 400)
    spec = ClusterSpec(
        worker,
        2,
        worker if prefill_workers else None,
        prefill_workers,
        Transfer(1_000_000, 1e9, 0.001),
        routing="least-outstanding",
    )
    fast = simulate_cluster(jobs, spec, keep_token_times=True)
    slow = simulate_cluster(jobs, spec, keep_token_times=True, strides=False)
    assert math.isclose(fast.makespan, slow.makespan)
    _assert_alike(fast, slow)
