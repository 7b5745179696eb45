"""The decode worker's scheduler with many passes taken at once: what the simulator drives.

    passes = scheduler.stride(plan, now, seconds)
    events = scheduler.apply_stride(plan, passes, token_id, total, now)

Between two decisions a plan is the one before moved on by a token per sequence, so the passes up
to the next decision cost as much as one. Nothing is decided otherwise: the outcome is the same.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

from baton.types import Finish, Output
from scheduling.cost import StepRecord, Work
from scheduling.decode import DecodeScheduler
from scheduling.events import DecodeEvent
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Phase, Sequence
from scheduling.stride import passes_alike, passes_before

_MANY = 1 << 30


class StridingScheduler(DecodeScheduler):
    """A DecodeScheduler that can also say how many passes in a row are alike, and take them."""

    def stride(self, plan: StepPlan, now: float, seconds: float, most: int = _MANY) -> int:
        """How many passes in a row, up to `most`, that of the plan just made included, would be
        this very plan moved on by one token each, if nothing came from outside, each took
        `seconds`, and nobody sampled a stop token. At least 1; may be too few, never too many."""
        self._in_flight.require_newest(plan)
        return passes_alike(
            plan,
            now,
            seconds,
            most,
            capacity=self._capacity,
            rules=self._rules,
            policy=self._policy,
            residency=self._kv,
            chooser=self._chooser,
            several=self._groups.tenants.several,
        )

    def stride_before(
        self, plan: StepPlan, newcomer: Sequence, now: float, seconds: float, passes: int
    ) -> int:
        """How many of the `passes` that `stride` said would follow each other from `now` on, each
        of `seconds`, remain if this sequence joins those that wait: 1 if it may be let in."""
        if len(plan.chunks) < self._capacity.max_sequences or self._chooser.swaps:
            return 1
        if self._groups.tenants.several:
            return 1  # it may change the shares of all
        rank = self._policy.rank
        place = rank(newcomer)
        if any(rank(sequence) > place for sequence in self._in_flight.members):
            return 1
        return passes_before(plan, newcomer, now, seconds, passes, self._policy)

    def apply_stride(
        self,
        plan: StepPlan,
        passes: int,
        token_id: int,
        seconds: float,
        now: float,
        last: Items[int] | None = None,
    ) -> list[DecodeEvent]:
        """Take what `passes` passes gave, at most as many as `stride` said, that took `seconds` in
        all and ended `now`. Each sampled `token_id`, which ends nothing before the last of them;
        the last one `last[i]` for chunk i, if given. One event, with all its tokens of the
        stride, for each sequence that has ended."""
        self._drop(self._end_pass(plan))
        if self.cost.learns:
            work = Work.of(plan)
            for done in range(passes):
                then = replace(work, context=work.context + done * work.sequences)
                self.cost.add(StepRecord(then, seconds / passes))
        ending = last or (token_id,) * len(plan.chunks)
        before = (token_id,) * (passes - 1)
        grow_by, charge, is_live = self._kv.grow_by, self._policy.charge, self._is_live
        ended: list[tuple[Sequence, Finish, int]] = []
        for (sequence, _, _, _), token in zip(plan.chunks, ending, strict=True):
            if not is_live(sequence):
                continue
            grow_by(sequence, passes)
            sequence.tokens += before
            sequence.computed += passes
            self._kv.prefixes.keep(sequence)
            charge(sequence, seconds, now, passes)
            finish = sequence.append(token)
            if finish is not None:
                ended.append((sequence, finish, token))
        events: list[DecodeEvent] = []
        for sequence, finish, token in ended:
            self._finish(sequence, finish)
            tokens = (*before, token)
            events.append(Output(sequence.request.id, sequence.index, tokens, finish=finish))
        return events

    def advance(
        self, plan: StepPlan, passes: int, token_id: int, seconds: float, now: float
    ) -> StepPlan:
        """Take what the first `passes` of a stride gave, where more follow: `apply_stride`, and
        the same plan moved on, which runs from `now` on."""
        self.apply_stride(plan, passes, token_id, seconds, now)
        live = [s for s, _, _, _ in plan.chunks if s.phase is Phase.RUNNING and self._kv.grow(s)]
        chunks = tuple([Chunk(s, s.computed, 1, sample=True) for s in live])
        then = replace(plan, chunks=chunks)
        self._begin_pass(then, now)
        return then
