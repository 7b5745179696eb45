"""Swaps ahead of need, by example: how many at once, for whom, and when not.

tests/scheduling/test_swap.py has what holds for every swap.
"""

from __future__ import annotations

import dataclasses

import pytest

from scheduling.plan import Capacity
from scheduling.sequence import Phase
from tests.scheduling.test_swap import CAPACITY, Worker, ids, moves

WIDE = dataclasses.replace(CAPACITY, blocks=32, max_context=64, host_blocks=64, max_sequences=2)


def preempted(make_request, capacity: Capacity = WIDE, **rules) -> Worker:
    """Four requests of six blocks or more, each better ranked than the ones before."""
    worker = Worker(capacity, swapping="proactive", **rules)
    for priority, id in enumerate("abcd"):
        worker.submit(make_request(id, prompt=11, most=20, priority=priority))
        worker.step()
    return worker


def test_unfinished_swaps_hold_only_a_share_of_the_blocks(make_request) -> None:
    worker = preempted(make_request, per_block=5.0)
    worker.submit(make_request("big", prompt=40, most=4, priority=9))
    plan = worker.step()
    # Room for it takes more than one of them; one fills the share, an eighth of 32.
    assert len(plan.swap_out) == 1
    assert not worker.step().swap_out
    worker.finish()
    assert worker.all_is_free()


def test_the_worst_ranked_leaves_first(make_request) -> None:
    worker = preempted(make_request)
    worker.submit(make_request("new", prompt=20, most=4, priority=9))
    assert moves(worker.step()) == (["a"], [])


def test_the_place_of_who_leaves_the_pass_goes_to_the_next_best(make_request) -> None:
    capacity = dataclasses.replace(WIDE, max_sequences=4)
    worker = preempted(make_request, capacity, per_block=1.0)
    worker.submit(make_request("new", prompt=20, most=4, priority=9))
    plan = worker.step()
    assert moves(plan) == (["a"], [])
    assert ids(plan) == {"b", "c", "d"}
    assert not plan.swaps_first


def test_a_full_reserve_is_left_alone(make_request) -> None:
    worker = preempted(make_request, swap_reserve=0.1)
    assert worker.scheduler.load().waiting == 0
    assert worker.scheduler.load().free_blocks >= 3
    assert moves(worker.step()) == ([], [])


def test_a_short_reserve_is_refilled_by_who_does_not_run_and_who_left_stays_out(
    make_request,
) -> None:
    worker, plans = Worker(WIDE, swapping="proactive", swap_reserve=0.5), []
    for priority, id in enumerate("abcd"):
        worker.submit(make_request(id, prompt=11, most=20, priority=priority))
        plans.append(worker.step())
    first = next(plan for plan in plans if plan.swap_out)
    assert moves(first)[0] == ["a"]
    assert "a" not in ids(first)
    for _ in range(5):
        plan = worker.step()
        assert ids(plan) == {"c", "d"}
        assert not plan.swap_in, "it would come back into the reserve"
    worker.finish()
    assert worker.all_is_free()


@pytest.mark.parametrize("change", [{"preemption": "recompute"}, {"swapping": "reactive"}])
def test_nothing_moves_ahead_of_need_unless_asked_for(make_request, change) -> None:
    worker = Worker(WIDE, **{"swapping": "proactive", "swap_reserve": 0.5, **change})
    for priority, id in enumerate("abcd"):
        worker.submit(make_request(id, prompt=11, most=4, priority=priority))
    while worker.scheduler.load().running + worker.scheduler.load().waiting:
        assert moves(worker.step()) == ([], [])
    assert worker.scheduler.preemptions == 0


def test_without_a_host_pool_nothing_is_swapped(make_request) -> None:
    worker = preempted(make_request, dataclasses.replace(WIDE, host_blocks=0), swap_reserve=0.5)
    worker.finish()
    counters = worker.scheduler.counters
    assert counters.swapped_out == 0
    assert Phase.SWAPPED not in {s.phase for s in worker.scheduler._kv.placed()}
