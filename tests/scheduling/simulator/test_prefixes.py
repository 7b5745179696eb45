"""Conversations in a simulated cluster: what is computed, where, and what the queue expects."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from scheduling.cost import CostTracker, LinearCost
from scheduling.mlfq import Mlfq
from scheduling.order import Policy, make_policy
from scheduling.plan import Capacity
from scheduling.simulator.cluster import ClusterSpec, simulate_cluster
from scheduling.simulator.conversations import Conversations, Talks
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.queue import QueueOrder, WaitingQueue
from scheduling.simulator.traffic import EOS, PLAIN, Job, LogNormal, Source
from scheduling.simulator.worker import WorkerSpec

COST = LinearCost(base=0.01, per_token=0.001, per_sequence=0.0005)
BLOCK = 16
TALKS = Talks(
    rate=2.0,
    prompts=2,
    prompt_tokens=128,
    turns=4.0,
    said=LogNormal(20, 0.5),
    answered=LogNormal(30, 0.5),
    think=1.0,
    max_total=1000,
    max_tokens=100,
)


def _fcfs(cost: CostTracker) -> Policy:
    return make_policy("fcfs", cost=cost)


WORKER = WorkerSpec(Capacity(4000, BLOCK, 512, 8, 2048), COST, _fcfs, prefix_cache=True)


def computed(outcome: Outcome) -> int:
    return outcome.tally.prompt_tokens


def test_each_turn_repeats_all_that_was_said_before():
    talks = Conversations(TALKS, 30, seed=1)
    begun = list(talks.start())
    assert len(begun) == 30
    assert len({job.prompt_ids[:128] for job in begun if job.prompt_ids}) == 2
    several = 0
    for job in begun:
        while (following := talks.finished(job, 7.0)) is not None:
            answer = (PLAIN,) * (job.output_tokens - 1) + (EOS,)
            said_before = (*(job.prompt_ids or ()), *answer)
            assert (following.prompt_ids or ())[: len(said_before)] == said_before
            assert following.prompt_tokens == len(following.prompt_ids or ()) > len(said_before)
            assert following.arrived_at > 7.0
            job, several = following, several + 1
    assert talks.jobs == 30 + several > 60
    assert [job.id for job in talks.turns()][:2] == ["t00000-n000", "t00000-n001"]
    again = Conversations(TALKS, 30, seed=1)
    assert list(again.turns()) == list(talks.turns())


@pytest.mark.parametrize("helpers", [0, 2])
def test_prefix_aware_routing_computes_less_and_answers_sooner(helpers: int):
    def serve(routing: str) -> Outcome:
        spec = ClusterSpec(WORKER, 4 - helpers, WORKER if helpers else None, helpers)
        talks = Conversations(TALKS, 60, seed=2)
        outcome = simulate_cluster(talks, replace(spec, routing=routing))
        assert len(outcome.served) == talks.jobs
        return outcome

    blind, aware = serve("kv-aware"), serve("prefix-aware")
    assert 1.3 * computed(aware) < computed(blind)
    assert aware.first_token().mean() < blind.first_token().mean()


def test_without_shared_prefixes_routing_is_kv_aware():
    jobs = [
        Job(f"r{i}", i * 0.01, 40, 20 + i % 7, 40, prompt_ids=tuple(range(100 * i, 100 * i + 40)))
        for i in range(60)
    ]
    kv, prefix = (
        simulate_cluster(jobs, ClusterSpec(WORKER, 3, routing=routing))
        for routing in ("kv-aware", "prefix-aware")
    )
    assert kv == prefix


class Script(Source):
    """Jobs at their times."""

    def __init__(self, *jobs: Job) -> None:
        self.jobs = jobs

    def start(self):
        return iter(self.jobs)


PROMPT = tuple(range(10, 330))


def job(name: str, at: float, prompt: tuple[int, ...], output: int = 2) -> Job:
    return Job(name, at, len(prompt), output, 500, prompt_ids=prompt)


@pytest.mark.parametrize(("busy", "computed_there"), [(6, 0), (8, 40)])
def test_a_decode_worker_with_a_place_in_its_batch_computes_what_is_left(
    busy: int, computed_there: int
):
    """Eight sequences are a batch. In a full one the first token would wait for a place."""
    others = [job(f"x{i}", 1.0, (1000 + i,) * 20, output=400) for i in range(busy)]
    again = job("again", 3.0, (*PROMPT, *range(400, 440)))
    spec = ClusterSpec(WORKER, 1, WORKER, 1, routing="prefix-aware", local_prefill_tokens=64)
    outcome = simulate_cluster(Script(job("first", 0.0, PROMPT), *others, again), spec)
    remote = replace(spec, local_prefill_tokens=0)
    same = simulate_cluster(Script(job("first", 0.0, PROMPT), *others, again), remote)
    [ours], [theirs] = (
        [served.first_token_at for served in run.served if served.job.id == "again"]
        for run in (outcome, same)
    )
    assert (ours == theirs) == (computed_there == 40)
    assert computed(outcome) == computed(same)  # the prefill worker has the beginning, too


@pytest.mark.parametrize("prefill_workers", [0, 1])
def test_strides_change_nothing(prefill_workers: int):
    spec = ClusterSpec(
        WORKER,
        2,
        WORKER if prefill_workers else None,
        prefill_workers,
        routing="prefix-aware",
        ahead_sequences=1_000_000,
    )
    fast = simulate_cluster(Conversations(TALKS, 30, seed=3), spec)
    slow = simulate_cluster(Conversations(TALKS, 30, seed=3), spec, strides=False)
    assert computed(fast) == computed(slow)
    assert math.isclose(fast.makespan, slow.makespan)
    assert sorted(served.job.id for served in fast.served) == sorted(
        served.job.id for served in slow.served
    )


def test_the_first_level_counts_tokens_that_are_not_cached():
    order = QueueOrder("skip-join-mlfq", Mlfq(levels=5, quantum=0.05, ratio=2.0), COST, COST)
    queue = WaitingQueue(order)
    long, known = job("long", 0.0, PROMPT), job("known", 0.0, PROMPT)
    queue.push(long)
    queue.push(known, cached=304)
    assert queue.level(long) > queue.level(known) == 0
    assert queue.first(0.0) == known
