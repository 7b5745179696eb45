from collections.abc import Iterator

import pytest
import torch

from experiments.engines import Setup
from experiments.orders import LEARNED, ORDERS
from experiments.real import RealEngine, tiny_llama
from scheduling.order import make_policy
from scheduling.plan import Capacity
from scheduling.rules import Rules
from scheduling.simulator.traffic import (
    ClosedLoop,
    Job,
    Lengths,
    LogNormal,
    make_jobs,
    offline,
    oracle,
    poisson,
)

SHORT = Lengths("short", LogNormal(12, 1.0), LogNormal(8, 1.0), 40, 60)
FCFS = Setup(lambda cost: make_policy("fcfs", cost=cost), keep_token_times=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[RealEngine]:
    threads = torch.get_num_threads()
    capacity = Capacity(blocks=256, block_size=16, max_tokens=64, max_sequences=4, max_context=128)
    yield tiny_llama(layers=1, hidden=32, capacity=capacity)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("policy", ["fcfs", "skip-join-mlfq", "srpt-oracle"])
def test_every_output_has_its_jobs_true_length(engine: RealEngine, policy: str) -> None:
    jobs = make_jobs(SHORT, poisson(500.0), 40, seed=1, estimator=oracle)
    setup = Setup(lambda cost: make_policy(policy, cost=cost), keep_token_times=True)
    outcome = engine.serve(jobs, setup)
    assert {s.job.id for s in outcome.served} == {job.id for job in jobs}
    for served in outcome.served:
        assert served.token_times is not None
        assert len(served.token_times) == served.job.output_tokens
        assert served.job.arrived_at <= served.first_token_at <= served.finished_at


def test_an_output_may_be_as_long_as_its_cap(engine: RealEngine) -> None:
    jobs = [Job("one", 0.0, 5, 1, 1), Job("cap", 0.0, 5, 7, 7)]
    outcome = engine.serve(jobs, FCFS)
    lengths = {s.job.id: len(s.token_times or ()) for s in outcome.served}
    assert lengths == {"one": 1, "cap": 7}


def test_idle_time_is_jumped_over(engine: RealEngine) -> None:
    outcome = engine.serve([Job("a", 0.0, 5, 3, 9), Job("b", 1000.0, 5, 3, 9)], FCFS)
    assert outcome.makespan > 1000.0
    assert outcome.busy_seconds < 100.0
    assert all(s.completion < 100.0 for s in outcome.served)


def test_completions_lead_to_the_next_request_of_a_closed_loop(engine: RealEngine) -> None:
    jobs = make_jobs(SHORT, offline, 12, seed=2)
    outcome = engine.serve(ClosedLoop(jobs, 3), FCFS)
    assert len(outcome.served) == 12
    alive = [
        sum(o.job.arrived_at <= s.job.arrived_at < o.finished_at for o in outcome.served)
        for s in outcome.served
    ]
    assert max(alive) <= 3


def test_dynamic_batches_open_without_further_arrivals(engine: RealEngine) -> None:
    rules = Rules(filling="dynamic", dynamic_wait=0.5)
    setup = Setup(FCFS.policy, rules)
    outcome = engine.serve([Job("alone", 0.0, 5, 3, 9)], setup)
    assert outcome.served[0].first_token_at >= 0.5


def test_peak_kv_is_what_the_longest_sequences_hold_together(engine: RealEngine) -> None:
    outcome = engine.serve([Job("a", 0.0, 10, 6, 9), Job("b", 0.0, 20, 6, 9)], FCFS)
    assert outcome.peak_kv_tokens == 10 + 5 + 20 + 5


def test_a_pass_has_a_time_and_a_cost_model(engine: RealEngine) -> None:
    assert engine.step_seconds > 0
    assert engine.cost.first_iteration(40) > 0


def test_the_learned_order_is_among_those_that_run() -> None:
    assert LEARNED in {order.label for order in ORDERS}
