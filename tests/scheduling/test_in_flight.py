from __future__ import annotations

from dataclasses import replace

import pytest

from baton.types import Output
from engine.simulated import expected_tokens
from scheduling.blocks import BlockAllocator
from scheduling.events import RequestFailed
from scheduling.in_flight import InFlight
from scheduling.plan import Capacity, StepPlan
from tests.scheduling.worker import TOKEN_OF, Worker


class Pipeline(Worker):
    """A worker whose executor takes several plans at a time."""

    def __init__(self, capacity: Capacity, depth: int = 2, **options) -> None:
        super().__init__(replace(capacity, depth=depth), **options)
        self.flights: list[tuple[StepPlan, object]] = []

    def begin(self) -> set[str] | None:
        """The requests of the next plan."""
        plan = self.scheduler.plan(self.now)
        if plan is None:
            return None
        self.flights.append((plan, self.executor.submit(plan)))
        return {chunk.sequence.request.id for chunk in plan.chunks}

    def end(self):
        plan, handle = self.flights.pop(0)
        result = self.executor.result(handle)
        self.now += result.seconds
        return self.take(self.scheduler.apply(plan, result, self.now))

    def generate(self, make_request, names: str, **fields) -> None:
        """Submit requests, and compute their prompts."""
        for name in names:
            self.submit(make_request(name, prompt=2, **fields))
        while len(self.tokens) < len(names):
            self.begin()
            self.end()


def test_plans_in_flight_share_the_sequences_evenly(capacity, make_request) -> None:
    worker = Pipeline(capacity)
    worker.generate(make_request, "abcd", most=40)
    assert [worker.begin(), worker.begin()] == [{"a", "b"}, {"c", "d"}]
    for plan in ({"a", "b"}, {"c", "d"}) * 2:
        assert {event.request_id for event in worker.end()} == plan
        assert worker.begin() == plan


def test_plans_that_became_uneven_are_even_again_one_pass_later(capacity, make_request) -> None:
    worker = Pipeline(replace(capacity, max_sequences=8))
    worker.generate(make_request, "abcdef", most=40)
    assert [worker.begin(), worker.begin()] == [{"a", "b", "c"}, {"d", "e", "f"}]
    for name in "ab":
        worker.scheduler.abort(name, worker.now)
    worker.end()
    assert worker.begin() == {"c"}
    worker.end()
    assert worker.begin() == {"d", "e"}
    worker.end()
    assert worker.begin() == {"c", "f"}


def test_newcomers_do_not_count_for_a_plans_share(capacity, make_request) -> None:
    worker = Pipeline(capacity)
    worker.generate(make_request, "ab", most=40)
    for name in "cd":
        worker.submit(make_request(name, prompt=2))
    assert worker.begin() == {"a", "c", "d"}
    assert worker.begin() == {"b"}


def test_no_more_plans_than_the_pipeline_has_stages(capacity, make_request) -> None:
    worker = Pipeline(capacity)
    worker.generate(make_request, "abc", most=40)
    worker.begin()
    worker.begin()
    with pytest.raises(RuntimeError, match="not applied"):
        worker.scheduler.plan(worker.now)


def test_nobody_is_in_two_plans(capacity, make_request) -> None:
    worker = Pipeline(capacity)
    worker.submit(make_request("a", prompt=20, most=3))
    assert worker.begin() == {"a"}
    assert worker.begin() is None
    worker.end()
    assert worker.begin() == {"a"}


def test_plans_are_applied_in_their_order(capacity, make_request) -> None:
    worker = Pipeline(capacity)
    worker.generate(make_request, "ab", most=40)
    worker.begin()
    worker.begin()
    plan, handle = worker.flights[1]
    with pytest.raises(RuntimeError, match="began before it"):
        worker.scheduler.apply(plan, worker.executor.result(handle), worker.now)


def test_who_is_in_flight_does_not_give_way(make_request) -> None:
    capacity = Capacity(blocks=4, block_size=4, max_tokens=8, max_sequences=4, max_context=16)
    worker = Pipeline(capacity)
    requests = [make_request(name, prompt=3 + 4 * (name == "a"), most=8) for name in "abc"]
    for request in requests:
        worker.submit(request)
    while True:
        if len(worker.flights) < 2 and worker.begin() is not None:
            continue
        if not worker.flights:
            break
        running = [chunk.sequence for plan, _ in worker.flights[1:] for chunk in plan.chunks]
        held = [[*sequence.blocks] for sequence in running]
        worker.end()
        assert [sequence.blocks for sequence in running] == held
    assert worker.scheduler.preemptions > 0
    for request in requests:
        assert worker.tokens[request.id, 0] == expected_tokens(request, 0, TOKEN_OF)


def test_a_block_is_taken_and_used_in_one_plan_while_another_runs(capacity, make_request) -> None:
    worker = Pipeline(replace(capacity, max_tokens=16))
    for name, prompt in (("a", 2), ("b", 2), ("c", 4), ("d", 2)):
        worker.submit(make_request(name, prompt=prompt, most=40))
    worker.begin()
    worker.end()
    assert worker.begin() == {"a", "b"}
    blocks = worker.scheduler._kv.blocks
    blocks.allocate(blocks.free)
    assert worker.begin() == {"c"}  # which has one of its own full
    assert worker.scheduler.preemptions == 1


def test_nobody_gives_way_for_blocks_that_are_about_to_be_free(capacity, make_request) -> None:
    worker = Pipeline(replace(capacity, max_tokens=16, max_sequences=6))
    for name in "abcdef":
        worker.submit(make_request(name, prompt=4 if name == "d" else 2, most=40))
    worker.begin()
    worker.end()
    assert worker.begin() == {"a", "b", "c"}
    blocks = worker.scheduler._kv.blocks
    blocks.allocate(blocks.free)
    assert worker.scheduler.abort("f", worker.now)
    assert (blocks.free, blocks.settling) == (0, 1)
    assert worker.begin() == {"e"}  # while "d", which has its own one full, waits for that of "f"
    assert worker.scheduler.preemptions == 0


def test_blocks_of_who_has_ended_are_free_while_other_plans_run(capacity, make_request) -> None:
    worker = Pipeline(capacity)
    worker.generate(make_request, "ab", most=40)
    worker.begin()
    worker.begin()
    free = worker.free
    worker.scheduler.abort("a", worker.now)
    assert worker.free == free
    worker.end()
    assert worker.free == free + 1


def test_who_is_aborted_in_flight_ends_with_its_own_plan(capacity, make_request) -> None:
    worker = Pipeline(capacity)
    worker.generate(make_request, "ab", most=40)
    worker.begin()
    worker.begin()
    free = worker.free
    assert worker.scheduler.abort("b", worker.now)
    worker.end()
    assert worker.free == free
    assert worker.end() == []
    assert worker.free == free + 1
    worker.scheduler.check_integrity()


def test_a_broken_pass_fails_its_requests_and_their_sequences_in_other_plans(
    capacity, make_request
) -> None:
    worker = Pipeline(capacity)
    for name, n in (("a", 1), ("b", 2), ("c", 1)):
        worker.submit(make_request(name, prompt=2, most=9, n=n))
    while len(worker.tokens) < 4:
        worker.begin()
        worker.end()
    assert [worker.begin(), worker.begin()] == [{"a", "b"}, {"b", "c"}]
    plan, _ = worker.flights.pop(0)
    assert worker.scheduler.fail(plan, worker.now) == [RequestFailed("a"), RequestFailed("b")]
    (event,) = worker.end()
    assert isinstance(event, Output)
    assert event.request_id == "c"
    worker.scheduler.abort("c", worker.now)
    assert worker.free == capacity.blocks


# -- Blocks and plans by themselves --------------------------------------------------------------


def test_blocks_settle_until_every_pass_that_had_begun_has_ended() -> None:
    blocks = BlockAllocator(4)
    first, second = blocks.allocate(1), blocks.allocate(1)
    blocks.begin_pass()
    blocks.release(first)
    blocks.begin_pass()
    blocks.release(second)
    assert (blocks.free, blocks.settling) == (2, 2)
    blocks.end_pass()
    assert (blocks.free, blocks.settling) == (3, 1)
    blocks.begin_pass()
    blocks.end_pass()
    assert (blocks.free, blocks.settling) == (4, 0)


def test_blocks_that_no_pass_uses_do_not_settle() -> None:
    blocks = BlockAllocator(2)
    held = blocks.allocate(2)
    blocks.begin_pass()
    with blocks.unused():
        blocks.release(held[:1])
    blocks.release(held[1:])
    assert (blocks.free, blocks.settling) == (1, 1)


@pytest.mark.parametrize(
    ("depth", "running", "share"), [(1, 5, 5), (2, 5, 3), (4, 5, 2), (2, 0, 1), (3, 1, 1)]
)
def test_a_share_is_one_part_in_so_many_rounded_up(depth: int, running: int, share: int) -> None:
    assert InFlight[str](depth).share(running) == share
