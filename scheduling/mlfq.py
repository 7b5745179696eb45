"""Multi-level feedback queues (FastServe section 4.1), naive and skip-join.

Level i has a quantum of `quantum * ratio ** i` seconds, the last one has no end. A sequence sinks
when its quantum is spent. In the naive queue everybody joins level 0. With skip-join a sequence
joins the first level whose quantum covers its first iteration: the levels above would only demote
it, and it would displace others at each.

The starved are served first until they have had a quantum of level 0, and are then where they had
sunk to (scheduling/standing.py). FastServe has them sink again from level 0 through all quanta;
docs/decisions/004-predicted-srpt.md has what that costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from scheduling.cost import CostTracker
from scheduling.remaining import RemainingWork
from scheduling.sequence import Sequence, Standing
from scheduling.standing import PreemptivePolicy


class Levelled(Protocol):
    """What sinks: its level, and the seconds of service that it has had there."""

    level: int
    served: float


@dataclass(frozen=True, slots=True)
class Mlfq:
    """The levels. `promote_after` is the wait, in seconds, after which a sequence is starved;
    infinite: never."""

    levels: int = 16
    quantum: float = 0.025
    ratio: float = 2.0
    promote_after: float = 5.0

    def quantum_of(self, level: int) -> float:
        """Seconds of service in `level` before demotion."""
        return self.quantum * self.ratio**level if level < self.levels - 1 else math.inf

    def first_level(self, cost: float) -> int:
        """The level that a sequence joins whose first iteration takes `cost` seconds."""
        return next(level for level in range(self.levels) if self.quantum_of(level) >= cost)

    def charge(self, sequence: Levelled, seconds: float) -> None:
        """It was served; demote it, by more than a level if that used up several quanta. What is
        left over counts in the new level, so many charges are the same as their sum."""
        sequence.served += seconds
        while sequence.served >= (quantum := self.quantum_of(sequence.level)):
            sequence.served -= quantum
            sequence.level += 1


_ORDINARY = Standing.ORDINARY


class MlfqPolicy(PreemptivePolicy):
    """Level by level, first come first served within one; everybody joins level 0."""

    def __init__(self, mlfq: Mlfq, cost: CostTracker) -> None:
        super().__init__(
            RemainingWork(cost), promote_after=mlfq.promote_after, quantum=mlfq.quantum
        )
        self._mlfq = mlfq
        self._cost = cost
        self._quanta = [mlfq.quantum_of(level) for level in range(mlfq.levels)]
        # The last level has no end: as if it had the quantum that would come next.
        self._as_quanta = [mlfq.quantum * mlfq.ratio**level for level in range(mlfq.levels)]

    def join(self, sequence: Sequence, tokens: int, now: float) -> None:
        """Join the first level, or the one that the sequence had sunk to elsewhere."""
        first = self._first_level(tokens)
        sequence.level = min(max(sequence.level, first), self._mlfq.levels - 1)
        super().join(sequence, tokens, now)

    def next_run(self, ranked: Items[Sequence], slots: int, now: float) -> list[float]:
        """FastServe section 4.2: the earlier of promotion and execution. To be executed, a
        sequence waits until all before it have sunk to its level and those who came earlier have
        sunk out of it, `slots` at a time, none finishing before. O(sequences + levels)."""
        ahead = 0.0  # seconds that all those before the next one get before it is their equal
        priority: int | None = None
        level = above = same = 0  # where the walk is, and the sequences passed
        quanta, last = self._quanta, self._as_quanta
        lifted_at = self.patience - now
        times = list[float]()
        for sequence in ranked:
            standing = sequence.standing
            if standing is _ORDINARY:
                if sequence.request.priority != priority:
                    # How long higher classes take is not known: as if they stayed where they are.
                    priority = sequence.request.priority
                    level = above = same = 0
                while level < sequence.level:
                    ahead += above * quanta[level]
                    above += same
                    same = 0
                    level += 1
            waits, lifted_in = ahead / slots, sequence.waiting_since + lifted_at
            times.append(waits if waits <= lifted_in else max(0.0, lifted_in))
            if standing is _ORDINARY:  # it sinks out of its level
                sinks_in = last[sequence.level] - sequence.served
                ahead += sinks_in if sinks_in > 0 else 0.0
                same += 1
            elif standing is Standing.STARVED:
                ahead += sequence.credit
            else:
                ahead += self._work.seconds(sequence)
        return [0.0] * min(slots, len(times)) + times[slots:]

    def _first_level(self, tokens: int) -> int:
        return 0

    def _measure(self, sequence: Sequence) -> float:
        return float(sequence.level)

    def _served(self, sequence: Sequence, seconds: float) -> None:
        if sequence.served + seconds < self._quanta[sequence.level]:
            sequence.served += seconds
        else:
            self._mlfq.charge(sequence, seconds)
            sequence.rank = None

    def _until_behind(self, sequence: Sequence, other: Sequence, pass_seconds: float) -> float:
        """Until it has sunk to the level of the other, or below it if it came before."""
        earlier = self.rank(sequence)[3:] < self.rank(other)[3:]
        levels = self._quanta[sequence.level : other.level + earlier]
        return sum(levels) - sequence.served


class SkipJoinMlfq(MlfqPolicy):
    """The same, but joining the first level whose quantum covers the first iteration."""

    def _first_level(self, tokens: int) -> int:
        return self._mlfq.first_level(self._cost.model.first_iteration(tokens))
