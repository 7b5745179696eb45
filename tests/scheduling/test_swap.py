"""Swapping by example; tests/scheduling/test_decode_properties.py has the rest. KV is real here: a
wrong block gives a wrong token (engine/simulated.py)."""

from __future__ import annotations

import dataclasses

import pytest

from baton.types import Output
from engine.simulated import CostModelExecutor, checksum_token, expected_tokens
from scheduling.cost import CostTracker, LinearCost
from scheduling.decode import DecodeScheduler
from scheduling.order import make_policy
from scheduling.plan import Capacity, Sampled, StepPlan, StepResult, Swap
from scheduling.rules import Rules
from scheduling.sequence import Phase
from scheduling.swap import SECONDS_PER_BLOCK

TOKEN_OF = checksum_token(1000)
CAPACITY = Capacity(
    blocks=8, block_size=2, max_tokens=32, max_sequences=4, max_context=16, host_blocks=16
)


class Worker:
    """A scheduler with an executor whose passes take a second."""

    def __init__(self, capacity: Capacity = CAPACITY, *, per_block=0.0, per_token=0.0, **rules):
        rules = {"preemption": "swap", "swap_reserve": 0.0, **rules}
        cost = CostTracker(LinearCost(1.0, per_token), every=0)
        self.scheduler = DecodeScheduler(
            capacity, make_policy("fcfs"), max_waiting=99, rules=Rules(**rules), cost=cost
        )
        self.executor = CostModelExecutor(
            capacity, cost.model, TOKEN_OF, swap_seconds_per_block=per_block
        )
        self.now = 0.0
        self.tokens: dict[str, list[int]] = {}

    def submit(self, request):
        (sequence,) = self.scheduler.submit(request, self.now)
        return sequence

    def step(self) -> StepPlan:
        plan = self.scheduler.plan(self.now)
        self.scheduler.check_integrity()
        result = self.executor.execute(plan)
        self.now += result.seconds
        for event in self.scheduler.apply(plan, result, self.now):
            if isinstance(event, Output):
                self.tokens.setdefault(event.request_id, []).extend(event.token_ids)
        self.scheduler.check_integrity()
        return plan

    def finish(self) -> None:
        while self.scheduler.load().running + self.scheduler.load().waiting:
            self.step()

    def all_is_free(self) -> bool:
        load = self.scheduler.load()
        host = self.scheduler._kv.swaps.host
        return (load.free_blocks, host.free) == (load.total_blocks, host.total)


def ids(plan: StepPlan) -> set[str]:
    return {chunk.sequence.request.id for chunk in plan.chunks}


def moves(plan: StepPlan) -> tuple[list[str], list[str]]:
    """Who is swapped out, and in."""
    return (
        [swap.sequence.request.id for swap in plan.swap_out],
        [swap.sequence.request.id for swap in plan.swap_in],
    )


@pytest.fixture
def two(make_request):
    """Two requests that fit at first, but not when they have grown."""
    return [make_request(id, prompt=4, most=10) for id in "ab"]


def test_growth_swaps_out_the_worst_and_the_pass_waits_for_it(two) -> None:
    worker = Worker(swapping="reactive")
    first, second = (worker.submit(request) for request in two)
    plan = worker.step()
    while second.phase is Phase.RUNNING:
        plan = worker.step()
    assert plan.swaps_first
    assert moves(plan) == (["b"], [])
    assert ids(plan) == {"a"}
    assert set(first.blocks) & set(plan.swap_out[0].device), "used in the very same pass"
    assert second.phase is Phase.SWAPPED
    assert second.computed == len(second.tokens) - 1, "nothing is computed twice"
    worker.finish()
    for request in two:
        assert worker.tokens[request.id] == expected_tokens(request, 0, TOKEN_OF)
    assert worker.all_is_free()
    counters = worker.scheduler.counters
    assert (counters.recomputed, counters.swapped_out, counters.swapped_in) == (0, 1, 1)
    assert counters.blocks_out == counters.blocks_in > 0
    assert worker.scheduler.preemptions == second.preemptions == 1


@pytest.mark.parametrize("swapping", ["reactive", "proactive"])
def test_a_better_class_has_room_made_for_it(make_request, swapping) -> None:
    worker = Worker(swapping=swapping)
    low = worker.submit(make_request("low", prompt=10, most=6))
    worker.step()
    high = worker.submit(make_request("high", prompt=8, most=3, priority=1))
    plan = worker.step()
    assert moves(plan) == (["low"], [])
    assert plan.swaps_first == (swapping == "reactive")
    assert ids(plan) == ({"high"} if swapping == "reactive" else set())
    worker.finish()
    assert low.preemptions == 1
    assert high.preemptions == 0
    assert worker.scheduler.counters.recomputed == 0
    assert len(worker.tokens["low"]) == 6
    assert worker.all_is_free()


def test_nobody_is_swapped_for_one_of_its_own_rank_or_below(make_request) -> None:
    worker = Worker(swapping="reactive")
    worker.submit(make_request("a", prompt=10, most=6))
    worker.step()
    worker.submit(make_request("b", prompt=10, most=6))
    while worker.scheduler.load().waiting:
        assert moves(worker.step()) == ([], [])


def test_others_run_while_room_is_made_ahead_of_need(make_request) -> None:
    worker = Worker(swapping="proactive", per_block=0.9)
    stays = worker.submit(make_request("stays", prompt=4, most=8, priority=1))
    worker.submit(make_request("leaves", prompt=6, most=9))
    worker.step()
    worker.submit(make_request("new", prompt=4, most=4, priority=1))
    plan = worker.step()
    assert moves(plan) == (["leaves"], [])
    assert not plan.swaps_first
    assert ids(plan) == {"stays"}
    assert not worker.scheduler.counters.waits
    assert stays.preemptions == 0


def test_the_reserve_is_filled_by_who_will_run_last_and_not_by_who_runs_now(make_request) -> None:
    capacity = dataclasses.replace(CAPACITY, blocks=20, max_sequences=1, max_context=40)
    worker = Worker(capacity, swapping="proactive", swap_reserve=0.5)
    for priority, id in enumerate("abc"):  # each displaces the one before
        worker.submit(make_request(id, prompt=6, most=20, priority=priority))
        plan = worker.step()
    while not plan.swap_out:
        plan = worker.step()
    assert moves(plan) == (["a"], [])
    assert ids(plan) == {"c"}


def test_what_is_swapped_out_comes_back_before_its_turn_if_there_is_room(make_request) -> None:
    worker = Worker(dataclasses.replace(CAPACITY, max_sequences=1), swapping="proactive")
    low = worker.submit(make_request("low", prompt=6, most=8))
    worker.step()
    worker.submit(make_request("high", prompt=10, most=2, priority=1))
    while low.phase is not Phase.SWAPPED:
        worker.step()
    worker.submit(make_request("next", prompt=2, most=5, priority=1))
    back = worker.step()
    while not back.swap_in:
        back = worker.step()
    assert ids(back) == {"next"}, "it is brought back while another one runs"
    worker.finish()
    assert worker.scheduler.counters.swapped_in == 1


def test_without_room_in_the_host_pool_kv_is_computed_again(two) -> None:
    worker = Worker(dataclasses.replace(CAPACITY, host_blocks=1), swapping="reactive")
    for request in two:
        worker.submit(request)
    worker.finish()
    counters = worker.scheduler.counters
    assert (counters.recomputed, counters.swapped_out) == (1, 0)
    assert worker.tokens["b"] == expected_tokens(two[1], 0, TOKEN_OF)


@pytest.mark.parametrize(
    ("per_token", "kind"), [(SECONDS_PER_BLOCK / 100, "recomputed"), (0.1, "swapped_out")]
)
def test_auto_does_whatever_costs_less(two, per_token, kind) -> None:
    worker = Worker(preemption="auto", swapping="reactive", per_token=per_token)
    for request in two:
        worker.submit(request)
    worker.finish()
    assert getattr(worker.scheduler.counters, kind) == 1
    assert worker.scheduler.preemptions == 1


def test_the_time_of_a_swap_is_measured_without_the_pass_that_waited_for_it(two) -> None:
    worker = Worker(swapping="reactive", per_block=0.25)
    for request in two:
        worker.submit(request)
    while not worker.scheduler.counters.swapped_in:
        worker.step()
    measured = worker.scheduler._kv.swaps.seconds_per_block
    before = SECONDS_PER_BLOCK
    for _ in range(2):
        before += 0.2 * (0.25 - before)
    assert measured == pytest.approx(before)


def test_with_nothing_else_to_run_a_plan_waits_for_a_swap(make_request) -> None:
    worker = Worker(swapping="proactive", per_block=10.0)
    worker.submit(make_request("low", prompt=10, most=6))
    worker.step()
    worker.submit(make_request("high", prompt=8, most=3, priority=1))
    plan = worker.step()
    assert not plan.chunks
    assert worker.scheduler.counters.waits == 1
    assert ids(worker.step()) == {"high"}


# -- Ends in mid-swap ----------------------------------------------------------------------


class SlowSwaps:
    """A scheduler whose swaps end when the test says so, in mid-swap at once: `low` was running
    and has given way to `high`."""

    def __init__(self, make_request) -> None:
        rules = Rules(preemption="swap", swap_reserve=0.0)
        self.scheduler = DecodeScheduler(CAPACITY, make_policy("fcfs"), max_waiting=9, rules=rules)
        (self.low,) = self.scheduler.submit(make_request("low", prompt=8, most=7), 0.0)
        self.step()
        self.scheduler.submit(make_request("high", prompt=10, most=5, priority=1), 0.0)
        (self.out,) = self.step().swap_out

    def step(self, *swapped: int) -> StepPlan:
        plan = self.scheduler.plan(0.0)
        sampled = tuple(Sampled(1) if chunk.sample else None for chunk in plan.chunks)
        self.scheduler.apply(plan, StepResult(sampled, ((),) * len(sampled), 1.0, swapped), 0.0)
        self.scheduler.check_integrity()
        return plan

    def bring_back(self) -> Swap:
        """End the swap out; nothing is in the way of `low` any more."""
        self.step(self.out.number)
        assert self.low.phase is Phase.SWAPPED
        self.scheduler.abort("high", 0.0)
        (back,) = self.step().swap_in
        return back

    def free(self) -> tuple[int, int]:
        """Blocks on the device, and in the host pool."""
        return self.scheduler.load().free_blocks, self.scheduler._kv.swaps.host.free


def test_blocks_of_an_aborted_swap_out_stay_its_own_until_it_is_complete(make_request) -> None:
    swaps = SlowSwaps(make_request)
    assert swaps.low.phase is Phase.LEAVING
    swaps.scheduler.abort("low", 0.0)
    assert swaps.free() == (4, 12)
    swaps.step(swaps.out.number)
    assert swaps.free() == (8, 16)


def test_blocks_of_an_aborted_swap_in_stay_its_own_until_it_is_complete(make_request) -> None:
    swaps = SlowSwaps(make_request)
    back = swaps.bring_back()
    assert swaps.low.phase is Phase.RETURNING
    assert len(swaps.low.blocks) == 5
    swaps.scheduler.abort("low", 0.0)
    assert swaps.free() == (4, 12), "the block for its newest token is no part of the swap"
    swaps.step(back.number)
    assert swaps.free() == (8, 16)


def test_a_swapped_out_sequence_can_be_aborted(make_request) -> None:
    swaps = SlowSwaps(make_request)
    swaps.step(swaps.out.number)
    swaps.scheduler.abort("low", 0.0)
    swaps.scheduler.check_integrity()
    assert swaps.free()[1] == 16


def test_a_broken_pass_does_not_end_its_swaps(make_request) -> None:
    swaps = SlowSwaps(make_request)
    swaps.step(swaps.out.number)
    swaps.scheduler.abort("high", 0.0)
    plan = swaps.scheduler.plan(0.0)
    assert swaps.scheduler.fail(plan, 0.0) == []
    assert swaps.low.phase is Phase.RETURNING
    swaps.step(plan.swap_in[0].number)
    assert swaps.low.phase is Phase.RUNNING


def test_what_has_come_back_runs_before_it_goes_again(make_request) -> None:
    swaps = SlowSwaps(make_request)
    back = swaps.bring_back()
    swaps.scheduler.submit(make_request("again", prompt=10, most=5, priority=1), 0.0)
    swaps.step(back.number)
    plan = swaps.step()
    assert ids(plan) == {"low"}
    assert not plan.swap_out
    assert moves(swaps.step()) == (["low"], [])


def test_a_swap_is_named_once(make_request) -> None:
    swaps = SlowSwaps(make_request)
    swaps.step(swaps.out.number)
    with pytest.raises(RuntimeError, match="not under way"):
        swaps.step(swaps.out.number)
