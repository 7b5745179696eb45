from __future__ import annotations

import math

import pytest

from scheduling.cost import CostTracker, LinearCost
from scheduling.mlfq import Mlfq
from scheduling.order import Policy, make_policy
from scheduling.plan import Capacity
from scheduling.simulator.engine import simulate
from scheduling.simulator.traffic import (
    SHAREGPT,
    ClosedLoop,
    Job,
    fixed,
    make_jobs,
    offline,
    poisson,
)
from scheduling.simulator.worker import WorkerSpec

COST = LinearCost(base=0.01, per_token=0.001, per_sequence=0.001, per_context=1e-6)


def _fcfs(cost: CostTracker) -> Policy:
    return make_policy("fcfs", cost=cost)


def _spec(blocks: int = 4000, sequences: int = 8, tokens: int = 512) -> WorkerSpec:
    return WorkerSpec(Capacity(blocks, 16, tokens, sequences, 2048), COST, _fcfs)


def test_one_job_takes_its_prompt_pass_and_one_pass_per_further_token() -> None:
    outcome = simulate([Job("a", 2.0, 10, 3, 50)], _spec(), keep_token_times=True)
    (served,) = outcome.served
    first = 2.0 + 0.01 + 10 * 0.001
    second = first + 0.011 + 11e-6
    third = second + 0.011 + 12e-6
    assert served.token_times == pytest.approx((first, second, third))
    assert served.first_token_at == served.token_times[0] if served.token_times else False
    assert served.finished_at == outcome.makespan == pytest.approx(third)
    assert outcome.steps == 3
    assert outcome.busy_seconds == pytest.approx(third - 2.0)
    assert outcome.peak_kv_tokens == 12


def test_every_job_is_served_its_true_length() -> None:
    jobs = make_jobs(SHAREGPT, poisson(4.0), 60, seed=1)
    outcome = simulate(jobs, _spec(), keep_token_times=True)
    assert {s.job.id for s in outcome.served} == {j.id for j in jobs}
    for served in outcome.served:
        assert served.token_times is not None
        assert len(served.token_times) == served.job.output_tokens
        assert served.job.arrived_at < served.first_token_at <= served.finished_at


def test_the_same_jobs_give_the_same_outcome() -> None:
    jobs = make_jobs(SHAREGPT, poisson(4.0), 40, seed=1)
    assert simulate(jobs, _spec()) == simulate(reversed(jobs), _spec())


def test_memory_too_small_for_all_costs_preemptions_and_no_job() -> None:
    jobs = make_jobs(fixed(30, 100), offline, 12, seed=0)
    outcome = simulate(jobs, _spec(blocks=20))
    assert len(outcome.served) == 12
    assert outcome.tally.preemptions > 0
    assert sum(s.preemptions for s in outcome.served) == outcome.tally.preemptions
    assert outcome.peak_kv_tokens <= 20 * 16


def test_what_can_never_fit_is_rejected_and_the_rest_goes_on() -> None:
    outcome = simulate([Job("big", 0.0, 3000, 10, 10), Job("a", 0.0, 10, 3, 50)], _spec())
    assert outcome.rejected == 1
    assert [s.job.id for s in outcome.served] == ["a"]


def test_closed_loop_clients_send_one_at_a_time() -> None:
    jobs = make_jobs(fixed(20, 5), offline, 9, seed=0)
    outcome = simulate(ClosedLoop(jobs, 3), _spec())
    assert len(outcome.served) == 9
    for served in outcome.served:
        beside = sum(
            o.job.arrived_at <= served.job.arrived_at < o.finished_at for o in outcome.served
        )
        assert beside <= 3


def test_skip_join_mlfq_trades_the_tail_for_the_short_ones() -> None:
    def skip_join(cost: CostTracker) -> Policy:
        levels = Mlfq(levels=10, quantum=0.03, ratio=2, promote_after=math.inf)
        return make_policy("skip-join-mlfq", mlfq=levels, cost=cost)

    jobs = make_jobs(SHAREGPT, poisson(2.6), 400, seed=3)
    spec = _spec(blocks=40_000)
    fcfs = simulate(jobs, spec)
    mlfq = simulate(jobs, WorkerSpec(spec.capacity, spec.cost, skip_join))
    assert mlfq.mean_normalized() < fcfs.mean_normalized()
    assert mlfq.completion_percentile(99) > fcfs.completion_percentile(99)
    assert mlfq.peak_kv_tokens > fcfs.peak_kv_tokens
