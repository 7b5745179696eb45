"""Skip-join multi-level feedback queue (FastServe).

Level i has a quantum of `quantum * ratio ** i` seconds, the last one has no end. A sequence joins
the first level whose quantum covers its first iteration (the levels above would only demote it),
sinks when its quantum is spent, and rises to level 0 when it has waited too long.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Mlfq:
    """The levels. `promote_after` is the wait, in seconds, that lifts a sequence to level 0."""

    levels: int = 5
    quantum: float = 0.05
    ratio: float = 4.0
    promote_after: float = 5.0

    def quantum_of(self, level: int) -> float:
        """Seconds of service in `level` before demotion."""
        return self.quantum * self.ratio**level if level < self.levels - 1 else float("inf")

    def first_level(self, cost: float) -> int:
        """The level that a sequence joins whose first iteration takes `cost` seconds."""
        return next(level for level in range(self.levels) if self.quantum_of(level) >= cost)

    def charge(self, sequence: Sequence, seconds: float, now: float) -> None:
        """A pass of `seconds` had `sequence` in it; demote it if that used up its quantum."""
        sequence.waiting_since = now
        sequence.served += seconds
        if sequence.served >= self.quantum_of(sequence.level):
            sequence.level += 1
            sequence.served = 0.0

    def promote(self, sequences: Iterable[Sequence], now: float) -> None:
        """Lift the starved to level 0 with a fresh quantum, whether they ran before or not."""
        latest = now - self.promote_after
        for sequence in sequences:
            if sequence.waiting_since <= latest:
                sequence.level = 0
                sequence.served = 0.0
                sequence.waiting_since = now
