"""The decode scheduler keeps its promises with several plans in flight, too.

The executor's first stage writes when a plan is submitted and its last one when its result is
fetched (engine/simulated.py), so blocks that change hands too early give wrong tokens.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from scheduling.plan import Capacity, StepPlan
from scheduling.rules import Rules
from scheduling.sequence import Phase
from tests.scheduling.test_decode_properties import WORLDS, DecodeMachine, check_plan


class Flight:
    """A plan in flight, and what must not change meanwhile."""

    def __init__(self, plan: StepPlan, handle: object, block_size: int) -> None:
        self.plan, self.handle = plan, handle
        self.sequences = [chunk.sequence for chunk in plan.chunks]
        self.still = [(s, [*s.tokens], s.computed, [*s.blocks]) for s in self.sequences]
        self.reads = {b for s in self.sequences for b in s.blocks}
        self.writes = {
            c.sequence.blocks[position // block_size]
            for c in plan.chunks
            for position in range(c.start, c.start + c.length)
        }

    def check(self) -> None:
        for sequence, tokens, computed, blocks in self.still:
            now = (sequence.tokens, sequence.computed, sequence.blocks)
            assert now == (tokens, computed, blocks), "changed during a pass"
            assert sequence.phase in (Phase.RUNNING, Phase.RETURNING), "gave way during a pass"


class PipelineMachine(DecodeMachine):
    """The worst mood, with up to four plans in flight."""

    @initialize(**WORLDS, depth=st.sampled_from([1, 2, 2, 3, 4]))
    def begin(
        self, capacity: Capacity, policy, rules: Rules, swap_seconds: float, keys, depth: int
    ) -> None:
        capacity = dataclasses.replace(capacity, depth=depth)
        super().begin(capacity, policy, rules, swap_seconds, keys)
        self.flights: deque[Flight] = deque()

    @precondition(lambda self: len(self.flights) < self.capacity.depth)
    @rule()
    def begin_pass(self) -> None:
        plan = self.scheduler.plan(self.now)
        if plan is None:
            self.nothing_to_plan()
            return
        check_plan(plan, self.capacity, self.rules_, [])
        flight = Flight(plan, self.executor.submit(plan), self.capacity.block_size)
        for other in self.flights:
            assert not set(flight.sequences) & set(other.sequences), "in two plans at once"
            assert not flight.writes & (other.reads | other.writes), "written by two"
            assert not flight.reads & other.writes, "read while another pass writes"
        self.flights.append(flight)

    def nothing_to_plan(self) -> None:
        if self.flights:
            return
        if self.scheduler.opens_at is not None:
            self.now = self.scheduler.opens_at
        elif not self.incoming:
            load = self.scheduler.load()
            assert (load.running, load.waiting) == (0, 0), "there was something to run"

    @precondition(lambda self: self.flights)
    @rule(broken=st.sampled_from([False] * 9 + [True]))
    def end_pass(self, broken: bool) -> None:
        for flight in self.flights:
            flight.check()
        flight = self.flights.popleft()
        result = self.executor.result(flight.handle)
        self.now += result.seconds
        if broken:
            self.unreported += result.swapped
            self.take(self.scheduler.fail(flight.plan, self.now))
        else:
            result = dataclasses.replace(result, swapped=self.unreported + result.swapped)
            self.unreported = ()
            self.take(self.scheduler.apply(flight.plan, result, self.now))

    def go_on(self) -> bool:
        if self.incoming:
            self.lose_one()
            return True
        before = len(self.flights)
        if before < self.capacity.depth:
            self.begin_pass()
        if len(self.flights) > before:
            return True
        if self.flights:
            self.end_pass(False)
            return True
        return self.scheduler.opens_at is not None


TestPipelineMachine = PipelineMachine.TestCase
TestPipelineMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
