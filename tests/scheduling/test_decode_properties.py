"""Whatever happens in whatever order, the decode scheduler keeps its promises.

A state machine submits, reserves, delivers, loses, aborts and breaks passes at random, also while
a pass runs. Many prompts begin alike, with a prefix cache and without. Tokens come from the KV
itself (engine/simulated.py), so a block that is shared wrongly, reused too early or written twice
shows as a wrong token.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from baton.errors import Overloaded
from baton.prefix import block_keys
from baton.types import LengthEstimate, Output, Request, Sampling, Stopping
from engine.simulated import CostModelExecutor, checksum_token, expected_tokens
from scheduling.decode import DecodeScheduler
from scheduling.events import RequestFailed
from scheduling.mlfq import Mlfq
from scheduling.order import make_policy
from scheduling.plan import Capacity, StepPlan
from scheduling.rules import Rules
from scheduling.sequence import Phase, Sequence

TOKEN_OF = checksum_token(50)
LIMIT = 5_000  # far more passes than anything here needs


@st.composite
def capacities(draw: st.DrawFn) -> Capacity:
    """Small pools: preemption and refusals are common."""
    block_size = draw(st.sampled_from([1, 2, 4, 16]))
    max_context = draw(st.integers(4, 40))
    return Capacity(
        blocks=-(-max_context // block_size) + draw(st.integers(0, 8)),
        block_size=block_size,
        max_tokens=draw(st.integers(1, 16)),
        max_sequences=draw(st.integers(1, 5)),
        max_context=max_context,
        host_blocks=draw(st.sampled_from([0, 2, 10, 40])),
    )


@st.composite
def policies(draw: st.DrawFn):
    mlfq = Mlfq(levels=draw(st.integers(1, 4)), quantum=0.02, ratio=2.0, promote_after=0.3)
    return make_policy(draw(st.sampled_from(["fcfs", "skip-join-mlfq"])), mlfq=mlfq)


@st.composite
def rules(draw: st.DrawFn) -> Rules:
    return Rules(
        admission=draw(
            st.sampled_from(["paged", "reserve-predicted", "reserve-sum", "reserve-max"])
        ),
        batching=draw(st.sampled_from(["splitfuse", "splitfuse", "prefill-first"])),
        filling=draw(st.sampled_from(["continuous"] * 4 + ["static", "dynamic"])),
        preemption=draw(st.sampled_from(["recompute", "swap", "swap", "auto"])),
        swapping=draw(st.sampled_from(["proactive", "reactive"])),
        swap_reserve=draw(st.sampled_from([0.0, 0.05, 0.3])),
        ahead=draw(st.booleans()),
    )


def check_plan(plan: StepPlan, capacity: Capacity, rules: Rules, before: list[Sequence]) -> None:
    """What must hold for every plan. `before`: running sequences that had all they needed to
    generate one more token."""
    whole = rules.batching == "prefill-first"
    assert plan.tokens <= capacity.max_tokens or (whole and len(plan.chunks) == 1)
    assert len(plan.chunks) <= capacity.max_sequences
    assert len({chunk.sequence for chunk in plan.chunks}) == len(plan.chunks)
    kinds = [chunk.sequence.generating for chunk in plan.chunks]
    assert kinds == sorted(kinds, reverse=True), "generation comes first"
    for chunk in plan.chunks:
        sequence, end = chunk.sequence, chunk.start + chunk.length
        assert chunk.start == sequence.computed, "every token is computed exactly once"
        assert chunk.length > 0
        assert chunk.sample == (end == len(sequence.tokens))
        assert len(sequence.blocks) >= capacity.blocks_for(end)
        assert plan.swaps_first or sequence.phase is Phase.RUNNING
    if whole:
        assert len(set(kinds)) <= 1, "prompts have passes of their own"
    if plan.tokens < capacity.max_tokens:
        assert all(chunk.sample for chunk in plan.chunks), "a cut prompt in a pass with room"
    advanced = {chunk.sequence for chunk in plan.chunks}
    starved = [s for s in before if s not in advanced and s.phase is Phase.RUNNING]
    if starved and not whole:
        assert len(plan.chunks) == capacity.max_sequences or sum(kinds) == capacity.max_tokens


WORLDS: dict[str, st.SearchStrategy[Any]] = {
    "capacity": capacities(),
    "policy": policies(),
    "rules": rules(),
    "swap_seconds": st.sampled_from([0.0, 0.0004, 0.003]),
    "keys": st.sampled_from([block_keys, block_keys, None]),
}
"""What a scheduler may find itself in."""


class DecodeMachine(RuleBasedStateMachine):
    """The worker around a scheduler, in its worst mood."""

    @initialize(**WORLDS)
    def begin(self, capacity: Capacity, policy, rules: Rules, swap_seconds: float, keys) -> None:
        self.capacity, self.rules_ = capacity, rules
        self.scheduler = DecodeScheduler(
            capacity, policy, max_waiting=20, rules=rules, block_keys=keys
        )
        self.executor = CostModelExecutor(
            capacity, token_of=TOKEN_OF, swap_seconds_per_block=swap_seconds
        )
        self.unreported: tuple[int, ...] = ()  # swaps that ended in a broken pass
        self.now = 0.0
        self.plan: StepPlan | None = None
        self.incoming: list[Sequence] = []
        self.outputs: dict[tuple[Request, int], list[int]] = {}
        self.ended: set[tuple[Request, int]] = set()
        self.unwanted: set[tuple[Request, int]] = set()  # of these: were aborted
        self.requests: dict[str, Request] = {}
        self.count = 0

    def draw_request(self, data: st.DataObject) -> Request:
        prompt = data.draw(st.integers(1, self.capacity.max_context - 1), label="prompt")
        most = data.draw(st.integers(1, self.capacity.max_context - prompt), label="most")
        self.count += 1
        first = data.draw(st.sampled_from([0, 0, 1, self.count]), label="first token")
        return Request(
            id=f"r{self.count}",
            prompt_ids=tuple((first + i) % 50 for i in range(prompt)),
            sampling=Sampling(n=data.draw(st.sampled_from([1, 1, 2, 3])), seed=self.count),
            stopping=Stopping(most),
            priority=data.draw(st.sampled_from([0, 0, 1])),
            tenant=data.draw(st.sampled_from(["", "", "a", "b"])),
            estimate=data.draw(
                st.none() | st.integers(1, 40).map(lambda n: LengthEstimate(n, n + n // 4)),
                label="estimate",
            ),
            prompt_logprobs=data.draw(st.sampled_from([None] * 5 + [0])),
            bypass_cache=data.draw(st.sampled_from([False] * 5 + [True])),
        )

    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        request = self.draw_request(data)
        try:
            self.scheduler.submit(request, self.now)
        except Overloaded:
            return
        self.requests[request.id] = request

    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        request = self.draw_request(data)
        try:
            sequence = self.scheduler.reserve(request, self.now)
        except Overloaded:
            return
        self.requests[request.id] = request
        self.incoming.append(sequence)

    @precondition(lambda self: self.incoming)
    @rule(data=st.data(), kv_is_here=st.booleans())
    def end_transfer(self, data: st.DataObject, kv_is_here: bool) -> None:
        index = data.draw(st.integers(0, len(self.incoming) - 1))
        sequence = self.incoming.pop(index)
        request, size = sequence.request, self.capacity.block_size
        for position in range(sequence.cached, len(sequence.tokens)):  # late writes included
            block = self.executor.store.block(sequence.blocks[position // size]).cast("i")
            block[position % size] = sequence.tokens[position]
        first = expected_tokens(request, 0, TOKEN_OF)[0]
        if request.id in self.requests:
            self.outputs[request, 0] = [first]
        end = self.scheduler.arrived if kv_is_here else self.scheduler.lost
        self.take(end(sequence, first, self.now))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        del self.requests[request_id]
        self.scheduler.abort(request_id, self.now)
        assert not self.scheduler.abort(request_id, self.now)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort_one_sequence(self, data: st.DataObject) -> None:
        request = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        index = data.draw(st.integers(0, request.sampling.n - 1))
        live = (request, index) not in self.ended
        arriving = index == 0 and any(s.request is request for s in self.incoming)
        aborted = self.scheduler.abort_sequence(request.id, index)
        assert aborted == (live and not arriving)
        if aborted:
            self.ended.add((request, index))
            self.unwanted.add((request, index))
        assert not self.scheduler.abort_sequence(request.id, index)

    @precondition(lambda self: self.plan is None)
    @rule()
    def begin_pass(self) -> None:
        before = [
            s
            for s in self.scheduler._kv.running
            if s.generating and len(s.blocks) >= self.capacity.blocks_for(len(s.tokens))
        ]
        self.plan = self.scheduler.plan(self.now)
        if self.plan is None and self.scheduler.opens_at is not None:
            self.now = self.scheduler.opens_at
        elif self.plan is None and not self.incoming:
            load = self.scheduler.load()
            assert (load.running, load.waiting) == (0, 0), "there was something to run"
        if self.plan is not None:
            check_plan(self.plan, self.capacity, self.rules_, before)
            sequences = [chunk.sequence for chunk in self.plan.chunks]
            self.still = [(s, [*s.tokens], [*s.blocks]) for s in sequences]

    @precondition(lambda self: self.plan is not None)
    @rule(broken=st.sampled_from([False] * 9 + [True]))
    def end_pass(self, broken: bool) -> None:
        assert self.plan is not None
        for sequence, tokens, blocks in self.still:
            assert (sequence.tokens, sequence.blocks) == (tokens, blocks), "changed during a pass"
        result = self.executor.execute(self.plan)
        self.now += result.seconds
        if broken:
            self.unreported += result.swapped
            self.take(self.scheduler.fail(self.plan, self.now))
        else:
            result = dataclasses.replace(result, swapped=self.unreported + result.swapped)
            self.unreported = ()
            self.take(self.scheduler.apply(self.plan, result, self.now))
        self.plan = None

    def take(self, events) -> None:
        for event in events:
            request = self.requests[event.request_id]  # no event names an aborted request
            if isinstance(event, RequestFailed):
                del self.requests[event.request_id]
            elif isinstance(event, Output):
                key = (request, event.index)
                assert key not in self.ended
                self.outputs.setdefault(key, []).extend(event.token_ids)
                if event.finish is not None:
                    self.ended.add(key)

    @invariant()
    def books_are_in_order(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def go_on(self) -> bool:
        """A step towards the end; False if there is nothing left to do."""
        if self.plan is not None:
            self.end_pass(False)
        elif self.incoming:
            self.lose_one()
        else:
            self.begin_pass()
            return self.plan is not None or self.scheduler.opens_at is not None
        return True

    def lose_one(self) -> None:
        sequence = self.incoming.pop()
        if sequence.request.id in self.requests:
            first = expected_tokens(sequence.request, 0, TOKEN_OF)[0]
            self.outputs[sequence.request, 0] = [first]
            self.take(self.scheduler.lost(sequence, first, self.now))
        else:
            self.scheduler.quiet(sequence)

    def teardown(self) -> None:
        """Everything that is still here finishes, with the right tokens, and leaves nothing."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(LIMIT):
            if not self.go_on():
                break
        self.scheduler.check_integrity()
        load = self.scheduler.load()
        assert (load.running, load.waiting) == (0, 0)
        assert load.free_blocks == load.total_blocks
        assert self.scheduler._kv.swaps.host.free == self.capacity.host_blocks
        for request in self.requests.values():
            for index in range(request.sampling.n):
                assert (request, index) in self.ended
                tokens = self.outputs.get((request, index), [])
                whole = expected_tokens(request, index, TOKEN_OF)
                if (request, index) in self.unwanted:
                    whole = whole[: len(tokens)]
                assert tokens == whole


TestDecodeMachine = DecodeMachine.TestCase
TestDecodeMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@settings(max_examples=40, deadline=None)
@given(capacity=capacities(), name=st.sampled_from(["fcfs", "skip-join-mlfq"]), seed=st.integers())
def test_the_same_input_gives_the_same_plans(capacity: Capacity, name: str, seed: int) -> None:
    def run() -> list[list[tuple[tuple[str, int], int, int, tuple[int, ...]]]]:
        rng, plans, now = random.Random(seed), [], 0.0
        scheduler = DecodeScheduler(capacity, make_policy(name), max_waiting=100)
        executor = CostModelExecutor(capacity, token_of=TOKEN_OF)
        for number in range(12):
            prompt = rng.randrange(1, capacity.max_context)
            stopping = Stopping(capacity.max_context - prompt)
            sampling = Sampling(n=rng.choice([1, 1, 2]))
            scheduler.submit(Request(f"r{number}", (number,) * prompt, sampling, stopping), now)
            for _ in range(rng.randrange(4)):
                if plan := scheduler.plan(now):
                    plans.append(
                        [
                            (c.sequence.id, c.start, c.length, (*c.sequence.blocks,))
                            for c in plan.chunks
                        ]
                    )
                    result = executor.execute(plan)
                    now += result.seconds
                    scheduler.apply(plan, result, now)
        return plans

    assert run() == run()
