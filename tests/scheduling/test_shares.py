"""Tenants share a worker: whatever one of them sends, nobody else gets less than their share."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types import LengthEstimate, Request, Sampling, Stopping
from engine.simulated import CostModelExecutor, checksum_token
from scheduling.cost import LinearCost
from scheduling.decode import DecodeScheduler
from scheduling.mlfq import Mlfq
from scheduling.order import NAMES, make_policy
from scheduling.plan import Capacity
from scheduling.prefill import PrefillScheduler
from scheduling.sequence import Sequence
from scheduling.shares import Tenants, in_turn, level, token_shares
from tests.scheduling.worker import Worker

PREEMPTIVE = [name for name in NAMES if name != "fcfs"]
TOKEN_OF = checksum_token(1000)


def request(id: str, tenant: str, prompt: int = 4, most: int = 50, **fields) -> Request:
    return Request(id, (5,) * prompt, Sampling(), Stopping(most), tenant=tenant, **fields)


def waiting(tenants: str, priorities: str = "") -> list[Sequence]:
    """Sequences in rank order, one for each letter."""
    given = priorities or "0" * len(tenants)
    return [
        Sequence.start(request(f"{place}", tenant, priority=int(priority)), 0, 0.0)
        for place, (tenant, priority) in enumerate(zip(tenants, given, strict=True))
    ]


def tenants_of(sequences) -> str:
    return "".join(s.request.tenant for s in sequences)


# -- The shares themselves ------------------------------------------------------------------


@given(wanted=st.lists(st.integers(0, 30), max_size=8), total=st.integers(0, 100))
def test_the_level_is_the_largest_that_suffices(wanted: list[int], total: int) -> None:
    found = level(wanted, total)
    assert sum(min(most, found) for most in wanted) <= total
    if found < max(wanted, default=0):
        assert sum(min(most, found + 1) for most in wanted) > total


def test_who_wants_more_than_its_share_stands_behind_the_others_in_the_order_of_the_policy():
    ranked = waiting("aaaaaabac")
    assert tenants_of(in_turn(ranked, 5)) == "aaabc" + "a" + "aaa"
    kept = [s for s in in_turn(ranked, 5) if s.request.tenant == "a"]
    assert kept == [s for s in ranked if s.request.tenant == "a"]


def test_what_one_leaves_unused_goes_to_those_that_want_more():
    assert tenants_of(in_turn(waiting("aaaaabbbbb" + "c"), 7)) == "aaabbbc" + "ab" + "ab"


def test_with_more_tenants_than_places_each_has_one_turn_before_any_has_two():
    assert tenants_of(in_turn(waiting("aabbccdd"), 2)) == "abcd" + "abcd"


def test_a_higher_class_is_served_first_and_the_rest_is_shared_by_the_next():
    ranked = waiting("aab" + "aaaab", "222" + "11111")
    assert tenants_of(in_turn(ranked, 5)) == "aab" + "ab" + "aaa"


def test_those_that_hold_a_place_keep_it_and_count_for_their_tenant():
    ranked = waiting("aaaaab")
    assert tenants_of(in_turn(ranked, 4, set(ranked[:3]))) == "aaa" + "b" + "aa"


def test_tokens_are_shared_to_the_last_one():
    ranked = [
        Sequence.start(request(f"{i}", tenant, prompt), 0, 0.0)
        for i, (tenant, prompt) in enumerate([("a", 90), ("a", 10), ("b", 3), ("c", 50)])
    ]
    assert token_shares(ranked, 64) == {(0, "a"): 31, (0, "b"): 3, (0, "c"): 30}
    assert token_shares(ranked, 1000) == {(0, "a"): 100, (0, "b"): 3, (0, "c"): 50}


def test_tenants_are_several_while_more_than_one_has_a_request():
    tenants = Tenants()
    seen = []
    for move, name in [("came", "a"), ("came", "b"), ("came", "b"), ("went", "b"), ("went", "b")]:
        getattr(tenants, move)(name)
        seen.append(tenants.several)
    assert seen == [False, True, True, True, False]


# -- On a decode worker ---------------------------------------------------------------------


@pytest.mark.parametrize("policy", PREEMPTIVE)
def test_a_newcomer_within_its_share_runs_in_the_next_pass(policy: str) -> None:
    worker = Worker(Capacity(400, 4, 64, 4, 200), policy)
    for number in range(10):
        worker.submit(request(f"flood-{number}", "flood", most=5))
    worker.step()
    worker.submit(request("calm", "calm", prompt=20, most=100))  # long: it would come last
    for _ in range(6):
        assert ("calm", 0) in worker.step()[0]


def test_under_fcfs_nobody_loses_a_place_but_the_next_free_ones_go_to_who_has_less() -> None:
    worker = Worker(Capacity(400, 4, 64, 4, 200), "fcfs")
    for number in range(10):
        worker.submit(request(f"flood-{number}", "flood", most=3 + number))
    first = set(worker.step()[0])
    for number in range(3):
        worker.submit(request(f"calm-{number}", "calm"))
    assert set(worker.step()[0]) == first
    worker.step()  # flood-0 ends
    assert set(worker.step()[0]) == first - {("flood-0", 0)} | {("calm-0", 0)}
    assert set(worker.step()[0]) == first - {("flood-0", 0), ("flood-1", 0)} | {
        ("calm-0", 0),
        ("calm-1", 0),
    }
    shape, _ = worker.step()  # both have their half: now the flood is next
    assert ("calm-2", 0) not in shape and len(shape) == 4


def test_priority_is_above_shares() -> None:
    worker = Worker(Capacity(400, 4, 64, 2, 200), "skip-join-mlfq")
    for number in range(3):
        worker.submit(request(f"high-{number}", "a", priority=1))
    worker.submit(request("low", "b"))
    assert {id for id, _ in worker.step()[0]} == {"high-0", "high-1"}


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[int, Request]]:
    """Requests with the pass before which they come."""
    count = draw(st.integers(1, 25))
    return [
        (
            draw(st.integers(0, 30)),
            request(
                f"r{number}",
                draw(st.sampled_from(["a", "a", "a", "b", "c"])),
                prompt=draw(st.integers(1, 12)),
                most=draw(st.integers(1, 25)),
                estimate=LengthEstimate(draw(st.integers(1, 25)), 25),
            ),
        )
        for number in range(count)
    ]


def scheduler_of(policy: str, slots: int) -> DecodeScheduler:
    mlfq = Mlfq(levels=4, quantum=0.02, promote_after=0.2)
    capacity = Capacity(2000, 4, 2000, slots, 64)  # what counts here is places
    return DecodeScheduler(capacity, make_policy(policy, mlfq=mlfq), max_waiting=100)


def run(scheduler: DecodeScheduler, requests: list[tuple[int, Request]]) -> list[list[str]]:
    """Ids in each pass; checks each against what is live."""
    executor = CostModelExecutor(scheduler._capacity, LinearCost(0.01, 0.001), TOKEN_OF)
    now, number, passes = 0.0, 0, []
    live: dict[str, Request] = {}
    while live or any(at >= number for at, _ in requests):
        for at, one in requests:
            if at == number:
                scheduler.submit(one, now)
                live[one.id] = one
        number += 1
        plan = scheduler.plan(now)
        assert (plan is None) == (not live)
        if plan is None:
            continue
        ids = [chunk.sequence.request.id for chunk in plan.chunks]
        passes.append(ids)
        check_shares(ids, live, scheduler)
        result = executor.execute(plan)
        now += result.seconds
        for event in scheduler.apply(plan, result, now):
            if getattr(event, "finish", None) is not None:
                del live[event.request_id]
    return passes


def check_shares(ids: list[str], live: dict[str, Request], scheduler: DecodeScheduler) -> None:
    """Every place is taken by somebody, and none by a tenant with more than another has that wants
    one, but under fcfs by those that had it."""
    slots = scheduler._capacity.max_sequences
    assert len(ids) == min(slots, len(live)), "a place is empty while somebody waits"
    if not scheduler._policy.preempts:
        return
    wanted = Counter(one.tenant for one in live.values())
    run_now = Counter(live[id].tenant for id in ids)
    for tenant, count in wanted.items():
        if run_now[tenant] < count:
            assert max(run_now.values()) <= run_now[tenant] + 1, (run_now, wanted)


@settings(max_examples=60, deadline=None)
@given(requests=traffic(), policy=st.sampled_from(NAMES), slots=st.integers(1, 6))
def test_nobody_runs_beyond_their_share_while_another_waits_within_theirs(
    requests: list[tuple[int, Request]], policy: str, slots: int
) -> None:
    run(scheduler_of(policy, slots), requests)


@settings(max_examples=30, deadline=None)
@given(requests=traffic(), policy=st.sampled_from(NAMES), slots=st.integers(1, 6))
def test_one_tenant_is_served_as_if_there_were_no_tenants(
    requests: list[tuple[int, Request]], policy: str, slots: int
) -> None:
    one = [(at, replace(each, tenant="only")) for at, each in requests]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scheduling.decode.in_turn", None)  # not even looked at
        alone = run(scheduler_of(policy, slots), one)
    shared = scheduler_of(policy, slots)
    shared._groups.tenants.came("somebody with nothing to run")
    assert run(shared, one) == alone


def test_a_worker_that_lacks_memory_takes_it_from_who_is_beyond_its_share() -> None:
    worker = Worker(Capacity(12, 4, 64, 4, 48), "fcfs")
    worker.submit(request("calm", "calm", prompt=8, most=30))
    worker.step()
    for number in range(3):
        worker.submit(request(f"flood-{number}", "flood", prompt=8, most=30))
    while not worker.scheduler.preemptions:
        worker.step()
    assert ("calm", 0) in worker.step()[0]
    ids = [s.request.id for s in worker.scheduler._kv.waiting]
    assert ids and all(id.startswith("flood") for id in ids)
    worker.finish()


# -- On a prefill worker --------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "skip-join-mlfq"])
def test_a_prompt_takes_at_most_as_many_times_as_long_as_there_are_tenants(policy: str) -> None:
    capacity = Capacity(400, 4, 32, 16, 200)
    scheduler = PrefillScheduler(capacity, make_policy(policy), max_waiting=100)
    executor = CostModelExecutor(capacity, LinearCost(1.0), TOKEN_OF)
    for number in range(9):
        scheduler.submit(request(f"flood-{number}", "flood", prompt=100), 0.0)
    scheduler.submit(request("calm", "calm", prompt=48), 0.0)
    got = []
    for number in range(4):
        plan = scheduler.plan(float(number))
        assert plan is not None and plan.tokens == 32, "no token is left over"
        got.append(sum(c.length for c in plan.chunks if c.sequence.request.id == "calm"))
        scheduler.apply(plan, executor.execute(plan), number + 1.0)
        scheduler.check_integrity()
    assert got == [16, 16, 16, 0]


def test_tokens_that_a_tenant_has_no_blocks_for_go_to_the_others() -> None:
    capacity = Capacity(16, 4, 32, 8, 64)
    scheduler = PrefillScheduler(capacity, make_policy("fcfs"), max_waiting=100)
    scheduler.submit(request("a", "a", prompt=60, most=4), 0.0)
    scheduler.submit(request("b", "b", prompt=60, most=4), 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert [(c.sequence.request.id, c.length) for c in plan.chunks] == [("a", 32)]
    scheduler.check_integrity()
