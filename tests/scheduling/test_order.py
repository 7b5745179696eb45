from __future__ import annotations

import math

import pytest

from baton.config import WorkerConfig
from baton.errors import ConfigError
from baton.types import Request, Sampling, Stopping
from scheduling.cost import CostTracker, LinearCost
from scheduling.mlfq import Mlfq
from scheduling.order import NAMES, Fcfs, make_policy, policy_from
from scheduling.sequence import Sequence
from scheduling.srpt import PredictedSrpt
from tests.scheduling.serving import Job, serve


def sequence(id: str, arrived: float = 0.0, priority: int = 0, level: int = 0) -> Sequence:
    request = Request(id, (1, 2), Sampling(), Stopping(4), priority=priority, level=level)
    return Sequence.start(request, 0, now=arrived)


def test_fcfs_orders_by_priority_class_then_arrival_then_id() -> None:
    policy = make_policy("fcfs")
    sequences = [
        sequence("late", 2.0),
        sequence("b", 1.0),
        sequence("a", 1.0),
        sequence("urgent", 3.0, priority=1),
    ]
    ranked = sorted(sequences, key=policy.rank)
    assert [s.request.id for s in ranked] == ["urgent", "a", "b", "late"]


def test_fcfs_does_not_care_for_service() -> None:
    policy = make_policy("fcfs")
    s = sequence("a")
    policy.charge(s, 100.0, now=1.0)
    policy.promote([s], now=1000.0)
    assert s.level == 0


def test_mlfq_orders_by_level_before_arrival() -> None:
    policy = make_policy("skip-join-mlfq", mlfq=Mlfq(quantum=1.0))
    old, new = sequence("old", 0.0), sequence("new", 5.0)
    for s in (old, new):
        policy.join(s, 1, now=s.arrived_at)
    assert sorted([new, old], key=policy.rank) == [old, new]
    policy.charge(old, 1.0, now=5.0)
    assert sorted([new, old], key=policy.rank) == [new, old]


def test_mlfq_skips_the_levels_that_a_long_prompt_would_only_fall_through() -> None:
    cost = CostTracker(LinearCost(base=0.0, per_token=0.01), every=0)
    policy = make_policy("skip-join-mlfq", mlfq=Mlfq(levels=4, quantum=0.1, ratio=2.0), cost=cost)
    levels = []
    for tokens in (10, 11, 40, 41, 10_000):
        s = sequence("r")
        policy.join(s, tokens, now=0.0)
        levels.append(s.level)
    assert levels == [0, 1, 2, 3, 3]


def test_mlfq_keeps_the_level_that_the_queue_gave_within_its_own_levels() -> None:
    policy = make_policy("skip-join-mlfq", mlfq=Mlfq(levels=3))
    for given, kept in ((1, 1), (2, 2), (9, 2)):
        s = sequence("r", level=given)
        policy.join(s, 1, now=0.0)
        assert s.level == kept


def test_three_jobs_are_served_best_by_srpt_then_skip_join_then_fcfs_then_naive_mlfq() -> None:
    """The point of FastServe's example: a naive queue preempts long prompts for nothing."""
    cost = LinearCost(base=0.0, per_token=1.0, per_sequence=1.0)
    jobs = [Job(0.0, prompt, output, output) for prompt, output in ((5, 2), (2, 3), (1, 2))]
    means = {}
    for name in ("fcfs", "mlfq", "skip-join-mlfq", "srpt-oracle"):
        mlfq = Mlfq(levels=4, quantum=1.0, ratio=2.0, promote_after=math.inf)
        policy = make_policy(name, mlfq=mlfq, cost=CostTracker(cost, every=0))
        means[name] = 3 * serve(policy, jobs, cost).mean_latency(jobs)
    assert means == {"fcfs": 28, "mlfq": 33, "skip-join-mlfq": 22, "srpt-oracle": 20}


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_serves_a_higher_class_first(name: str) -> None:
    policy = make_policy(name)
    low, high = sequence("low", 0.0), sequence("high", 9.0, priority=2)
    for s in (low, high):
        policy.join(s, 2, now=s.arrived_at)
    assert sorted([low, high], key=policy.rank) == [high, low]


def test_the_configuration_names_a_policy_and_its_rules() -> None:
    config = WorkerConfig(policy="predicted-srpt", srpt_aging=0.0)
    policy = policy_from(config, CostTracker())
    assert isinstance(policy, PredictedSrpt)
    assert policy.aging == 0.0
    assert isinstance(policy_from(WorkerConfig(policy="fcfs"), CostTracker()), Fcfs)


def test_fcfs_is_steady_for_ever_and_next_run_goes_by_position() -> None:
    policy = make_policy("fcfs")
    sequences = [sequence(str(i), float(i)) for i in range(4)]
    assert policy.steady(sequences[:2], sequences[2:], now=9.0, pass_seconds=1.0) == math.inf
    assert policy.next_run(sequences, 2, now=9.0) == [0.0, 0.0, 1.0, 2.0]


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="lottery"):
        make_policy("lottery")
