from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from baton.errors import AlreadyExists, InvalidRequest, Overloaded
from baton.prefix import block_keys
from baton.types import Finish, FinishReason, Load, PriorOutput, Request, Sampling, Stopping
from engine.simulated import CostModelExecutor, checksum_token, expected_tokens
from scheduling.cost import LinearCost
from scheduling.events import PrefillAdvanced, Prefilled, PrefillStarted, RequestFailed
from scheduling.order import make_policy
from scheduling.plan import Capacity, StepPlan
from scheduling.prefill import PrefillScheduler
from scheduling.prefix import PrefixCounters
from scheduling.sequence import Phase

TOKEN_OF = checksum_token(1000)


class Worker:
    """A scheduler with an executor, stepped by hand."""

    def __init__(self, capacity: Capacity, max_waiting: int = 100, keys=None) -> None:
        self.scheduler = PrefillScheduler(
            capacity, make_policy("fcfs"), max_waiting=max_waiting, block_keys=keys
        )
        self.executor = CostModelExecutor(capacity, LinearCost(1.0, 0.0, 0.0), TOKEN_OF)
        self.now = 0.0

    def submit(self, request):
        return self.scheduler.submit(request, self.now)

    def step(self):
        """One pass: request id -> tokens in it, and the events."""
        plan = self.scheduler.plan(self.now)
        assert plan is not None
        shape = {chunk.sequence.request.id: chunk.length for chunk in plan.chunks}
        result = self.executor.execute(plan)
        self.now += result.seconds
        events = self.scheduler.apply(plan, result, self.now)
        self.scheduler.check_integrity()
        return shape, events


@pytest.fixture
def worker(capacity) -> Worker:
    return Worker(capacity)


def test_several_prompts_share_a_pass_and_a_long_one_is_split(worker, make_request) -> None:
    for id, prompt in (("a", 3), ("b", 12), ("c", 2)):
        worker.submit(make_request(id, prompt=prompt))
    assert worker.step()[0] == {"a": 3, "b": 5}
    assert worker.step()[0] == {"b": 7, "c": 1}
    assert worker.step()[0] == {"c": 1}
    assert worker.scheduler.plan(worker.now) is None


def test_a_prefill_is_told_from_start_to_end(worker, make_request) -> None:
    request = make_request("a", prompt=12, most=5, prompt_logprobs=0)
    worker.submit(make_request("1st", prompt=8))
    sequence = worker.submit(request)
    worker.step()
    assert worker.step()[1] == [PrefillStarted(sequence), PrefillAdvanced(sequence, 8)]
    advanced, prefilled = worker.step()[1]
    assert advanced == PrefillAdvanced(sequence, 12)
    assert isinstance(prefilled, Prefilled)
    assert prefilled.output.token_ids == (expected_tokens(request, 0, TOKEN_OF)[0],)
    assert prefilled.output.finish is None
    assert [p.token_id for p in prefilled.prompt_logprobs] == list(request.prompt_ids[1:])
    assert (prefilled.queued, prefilled.computed) == (1.0, 2.0)


def test_blocks_are_the_receivers_from_the_start_event_on(worker, make_request) -> None:
    sequence = worker.submit(make_request("a", prompt=8))
    worker.step()
    assert worker.scheduler.load() == Load(0, 0, 14, 16)
    worker.scheduler.release(sequence.blocks)
    worker.scheduler.check_integrity()
    assert worker.scheduler.load() == Load(0, 0, 16, 16)


def test_a_prompt_starts_only_with_blocks_for_all_of_it_and_nobody_overtakes(
    worker, make_request
) -> None:
    first = worker.submit(make_request("a", prompt=40))
    worker.submit(make_request("b", prompt=40))
    worker.submit(make_request("c", prompt=2))
    for _ in range(5):
        assert set(worker.step()[0]) == {"a"}
    assert worker.scheduler.plan(worker.now) is None
    worker.scheduler.release(first.blocks)
    assert set(worker.step()[0]) == {"b"}


def test_a_first_token_can_be_the_last_one(worker, make_request) -> None:
    worker.submit(make_request("a", prompt=3, most=1))
    prefilled = worker.step()[1][-1]
    assert isinstance(prefilled, Prefilled)
    assert prefilled.output.finish == Finish(FinishReason.LENGTH)


def test_earlier_output_is_part_of_what_is_computed(worker, make_request) -> None:
    request = make_request("a", prompt=3, most=5)
    tokens = expected_tokens(request, 0, TOKEN_OF)
    again = make_request("a", prompt=3, most=5, prior_outputs=(PriorOutput(tuple(tokens[:2])),))
    worker.submit(again)
    shape, events = worker.step()
    assert shape == {"a": 5}
    assert isinstance(events[-1], Prefilled)
    assert events[-1].output.token_ids == (tokens[2],)


def test_what_cannot_be_taken_is_refused(capacity, make_request) -> None:
    worker = Worker(capacity, max_waiting=2)
    with pytest.raises(InvalidRequest):
        worker.submit(make_request("a", prompt=65, most=1))
    with pytest.raises(InvalidRequest):
        worker.submit(make_request("a", 3, prior_outputs=(PriorOutput((1,), finished=True),)))
    worker.submit(make_request("a", prompt=3))
    with pytest.raises(AlreadyExists):
        worker.submit(make_request("a", prompt=3))
    worker.submit(make_request("b", prompt=3))
    with pytest.raises(Overloaded):
        worker.submit(make_request("c", prompt=3))


def test_an_abort_before_the_start_event_frees_the_blocks(worker, make_request) -> None:
    sequence = worker.submit(make_request("a", prompt=8))
    plan = worker.scheduler.plan(0.0)
    assert worker.scheduler.abort("a", 0.0)
    assert not worker.scheduler.abort("a", 0.0)
    assert sequence.phase is Phase.RUNNING, "the pass reads it"
    assert worker.scheduler.load().free_blocks == 14, "the pass writes to its blocks"
    assert worker.scheduler.apply(plan, worker.executor.execute(plan), 1.0) == []
    worker.scheduler.check_integrity()
    assert worker.scheduler.load() == Load(0, 0, 16, 16)


def test_blocks_released_during_a_pass_are_used_again_only_after_it(worker, make_request) -> None:
    sequence = worker.submit(make_request("a", prompt=16))
    worker.step()
    plan = worker.scheduler.plan(worker.now)
    worker.scheduler.abort("a", worker.now)
    worker.scheduler.release(sequence.blocks)
    assert worker.scheduler.load().free_blocks == 12
    assert worker.scheduler.apply(plan, worker.executor.execute(plan), 3.0) == []
    worker.scheduler.check_integrity()
    assert worker.scheduler.load() == Load(0, 0, 16, 16)


def test_a_broken_pass_fails_the_requests_in_it_and_no_others(worker, make_request) -> None:
    worker.submit(make_request("a", prompt=8))
    worker.submit(make_request("b", prompt=8))
    plan = worker.scheduler.plan(0.0)
    assert worker.scheduler.fail(plan, 1.0) == [RequestFailed("a")]
    worker.scheduler.check_integrity()
    assert worker.step()[0] == {"b": 8}


def alike(id: str, prompt: int, **fields: Any) -> Request:
    """All prompts begin alike."""
    return Request(id, tuple(range(prompt)), Sampling(), Stopping(4), **fields)


def test_a_prompt_that_begins_as_another_did_has_only_the_rest_computed(capacity) -> None:
    worker = Worker(capacity, keys=block_keys)
    first = worker.submit(alike("a", 8))
    worker.step()
    # The same blocks are handed to both, whether the first receiver has given them back or not.
    second = worker.submit(alike("b", 13))
    shape, events = worker.step()
    assert shape == {"b": 5}
    assert events[1] == PrefillAdvanced(second, 13)
    assert events[2].cached == 8
    assert events[2].output.token_ids == (expected_tokens(second.request, 0, TOKEN_OF)[0],)
    assert second.blocks[:2] == first.blocks
    assert worker.scheduler.load().free_blocks == 16 - 4
    worker.scheduler.release(first.blocks)
    worker.scheduler.check_integrity()
    assert worker.scheduler.load().free_blocks == 16 - 4
    worker.scheduler.release(second.blocks)
    assert worker.scheduler.load().free_blocks == 16
    worker.submit(alike("c", 13))
    assert worker.step()[0] == {"c": 1}
    assert worker.scheduler.prefixes == PrefixCounters(8 + 13 + 13, 8 + 12)


@pytest.mark.parametrize(
    "fields",
    [{"tenant": "x"}, {"cache_salt": "x"}, {"bypass_cache": True}, {"prompt_logprobs": 0}],
)
def test_a_prompt_that_may_not_use_what_is_known_is_computed_whole(capacity, fields) -> None:
    worker = Worker(capacity, keys=block_keys)
    worker.submit(alike("a", 8))
    worker.step()
    worker.submit(alike("b", 8, **fields))
    shape, events = worker.step()
    assert shape == {"b": 8}
    assert events[-1].cached == 0


def test_tenants_share_a_pass_by_what_is_left_of_their_prompts(capacity) -> None:
    worker = Worker(capacity, keys=block_keys)
    worker.submit(alike("a", 8))
    worker.step()
    worker.submit(alike("b", 10))
    worker.submit(alike("c", 10, tenant="x"))
    assert worker.step()[0] == {"b": 2, "c": 6}


class PrefillMachine(RuleBasedStateMachine):
    """The worker around a prefill scheduler: random arrivals, aborts, lease ends and faults."""

    @initialize(
        block_size=st.sampled_from([1, 4, 16]),
        max_tokens=st.integers(1, 16),
        max_sequences=st.integers(1, 4),
        spare=st.integers(0, 10),
        policy=st.sampled_from(["fcfs", "skip-join-mlfq"]),
        depth=st.sampled_from([1, 1, 2, 3]),
        keys=st.sampled_from([block_keys, block_keys, None]),
    )
    def begin(self, block_size, max_tokens, max_sequences, spare, policy, depth, keys) -> None:
        blocks = -(-30 // block_size) + spare
        self.capacity = Capacity(
            blocks, block_size, max_tokens, max_sequences, max_context=32, depth=depth
        )
        self.scheduler = PrefillScheduler(
            self.capacity, make_policy(policy), max_waiting=10, block_keys=keys
        )
        self.executor = CostModelExecutor(self.capacity, token_of=TOKEN_OF)
        self.now = 0.0
        self.flights: deque[tuple[StepPlan, Any]] = deque()
        self.live: dict[str, Request] = {}
        self.computed: dict[str, int] = {}
        self.leases: dict[str, list[int]] = {}
        self.count = 0

    @rule(
        prompt=st.integers(1, 30),
        priority=st.sampled_from([0, 0, 1]),
        first=st.sampled_from([0, 0, 1, None]),
        tenant=st.sampled_from(["", "", "a"]),
    )
    def submit(self, prompt: int, priority: int, first: int | None, tenant: str) -> None:
        self.count += 1
        first = self.count if first is None else first
        request = Request(
            f"r{self.count}",
            tuple((first + i) % 1000 for i in range(prompt)),
            Sampling(),
            Stopping(2),
            priority=priority,
            tenant=tenant,
        )
        try:
            self.scheduler.submit(request, self.now)
        except Overloaded:
            return
        self.live[request.id] = request

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[request_id]
        assert self.scheduler.abort(request_id, self.now)

    @precondition(lambda self: set(self.leases) - set(self.live))
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(set(self.leases) - set(self.live))))
        self.scheduler.release(self.leases.pop(request_id))

    @precondition(lambda self: len(self.flights) < self.capacity.depth)
    @rule()
    def begin_pass(self) -> None:
        plan = self.scheduler.plan(self.now)
        if plan is None:
            return
        assert 0 < plan.tokens <= self.capacity.max_tokens
        assert len(plan.chunks) <= self.capacity.max_sequences
        if plan.tokens < self.capacity.max_tokens:
            assert all(chunk.sample for chunk in plan.chunks)
        running = {chunk.sequence for other, _ in self.flights for chunk in other.chunks}
        assert not running & {chunk.sequence for chunk in plan.chunks}, "in two plans at once"
        self.flights.append((plan, self.executor.submit(plan)))

    @precondition(lambda self: self.flights)
    @rule(broken=st.sampled_from([False] * 9 + [True]))
    def end_pass(self, broken: bool) -> None:
        plan, handle = self.flights.popleft()
        result = self.executor.result(handle)
        self.now += result.seconds
        if broken:
            events = self.scheduler.fail(plan, self.now)
        else:
            events = self.scheduler.apply(plan, result, self.now)
        for event in events:
            match event:
                case PrefillStarted(sequence):
                    self.leases[sequence.request.id] = list(sequence.blocks)
                case PrefillAdvanced(sequence, computed):
                    assert computed > self.computed.get(sequence.request.id, 0)
                    self.computed[sequence.request.id] = computed
                case Prefilled(sequence, output):
                    request = self.live.pop(sequence.request.id)
                    assert self.computed[request.id] == len(request.prompt_ids)
                    assert list(output.token_ids) == expected_tokens(request, 0, TOKEN_OF)[:1]
                    assert self.kv_of(request) == request.prompt_ids
                case RequestFailed(request_id):
                    del self.live[request_id]

    def kv_of(self, request: Request) -> tuple[int, ...]:
        """What a decode worker would pull."""
        blocks = self.leases[request.id]
        kv = [token for b in blocks for token in self.executor.store.block(b).cast("i")]
        return tuple(kv[: len(request.prompt_ids)])

    @invariant()
    def books_are_in_order(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        """All that is left finishes once leases end, and every block comes back."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2_000):
            if len(self.flights) == self.capacity.depth:
                self.end_pass(False)
            for request_id in set(self.leases) - set(self.live):
                self.scheduler.release(self.leases.pop(request_id))
            before = len(self.flights)
            self.begin_pass()
            if len(self.flights) == before:
                if not self.flights:
                    break
                self.end_pass(False)
        assert not self.live
        load = self.scheduler.load()
        assert load == Load(0, 0, load.total_blocks, load.total_blocks)


TestPrefillMachine = PrefillMachine.TestCase
TestPrefillMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
