"""Which sequence comes first. Policies are chosen by name, so that one can be swapped for another
on the same engine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Protocol

from baton.config import SchedulingConfig
from baton.errors import ConfigError
from scheduling.cost import CostTracker
from scheduling.mlfq import Mlfq
from scheduling.sequence import Sequence

Rank = tuple[int, float, float, str, int]
"""Lowest first: (-priority class, the policy's own measure, arrival, request id, index). Total."""


class Policy(Protocol):
    """An order over sequences. It alone sets `level`, `served` and `waiting_since`."""

    def join(self, sequence: Sequence, tokens: int, now: float) -> None:
        """It has arrived, with `tokens` to compute here before its next one is sampled."""
        ...

    def rank(self, sequence: Sequence) -> Rank:
        """Its place. May change only through the other methods."""
        ...

    def charge(self, sequence: Sequence, seconds: float, now: float) -> None:
        """A pass of `seconds` that ended `now` had the sequence in it."""
        ...

    def promote(self, sequences: Iterable[Sequence], now: float) -> None:
        """Called before each plan with everything that can run."""
        ...

    def next_run(self, ranked: Items[Sequence], slots: int, now: float) -> list[float]:
        """Estimated seconds until each of `ranked`, in rank order, is in a batch of `slots`
        sequences (FastServe's ENST); 0 for the first `slots`. An estimate: orders swaps only."""
        ...

    def steady(self, chosen: Iterable[Sequence], others: Iterable[Sequence], now: float) -> float:
        """Seconds of service that all of `chosen`, and none of `others`, can get from `now` on
        before the order of the two groups, or any of their levels, may change by that alone.
        May be too small, never too large."""
        ...


class Fcfs:
    """First come, first served, within a priority class."""

    def join(self, sequence: Sequence, tokens: int, now: float) -> None:
        """Nothing to set: the arrival is in the sequence."""

    def rank(self, sequence: Sequence) -> Rank:
        """By arrival."""
        request = sequence.request
        return (-request.priority, 0.0, sequence.arrived_at, request.id, sequence.index)

    def charge(self, sequence: Sequence, seconds: float, now: float) -> None:
        """Service changes nothing."""

    def promote(self, sequences: Iterable[Sequence], now: float) -> None:
        """Nobody can be overtaken, so nobody starves."""

    def next_run(self, ranked: Items[Sequence], slots: int, now: float) -> list[float]:
        """Nothing is known of lengths: by position."""
        return [float(max(0, place - slots + 1)) for place in range(len(ranked))]

    def steady(self, chosen: Iterable[Sequence], others: Iterable[Sequence], now: float) -> float:
        """Service changes nothing."""
        return math.inf


class SkipJoinMlfq:
    """Level by level, first come first served within one."""

    def __init__(self, mlfq: Mlfq, cost: CostTracker) -> None:
        self._mlfq = mlfq
        self._cost = cost

    def join(self, sequence: Sequence, tokens: int, now: float) -> None:
        """Join the first level whose quantum covers `tokens`, or the one that the sequence had
        sunk to elsewhere."""
        first = self._mlfq.first_level(self._cost.model.first_iteration(tokens))
        sequence.level = min(max(sequence.level, first), self._mlfq.levels - 1)
        sequence.waiting_since = now

    def rank(self, sequence: Sequence) -> Rank:
        """By level, then by arrival."""
        request = sequence.request
        return (
            -request.priority,
            sequence.level,
            sequence.arrived_at,
            request.id,
            sequence.index,
        )

    def charge(self, sequence: Sequence, seconds: float, now: float) -> None:
        """Count service against the quantum."""
        self._mlfq.charge(sequence, seconds, now)

    def promote(self, sequences: Iterable[Sequence], now: float) -> None:
        """Lift the starved."""
        self._mlfq.promote(sequences, now)

    def next_run(self, ranked: Items[Sequence], slots: int, now: float) -> list[float]:
        """FastServe section 4.2, still to come."""
        raise NotImplementedError

    def steady(self, chosen: Iterable[Sequence], others: Iterable[Sequence], now: float) -> float:
        """Nothing is promised."""
        return 0.0


def make_policy(name: str, *, mlfq: Mlfq | None = None, cost: CostTracker | None = None) -> Policy:
    """The policy called `name`: "fcfs" or "skip-join-mlfq". Raises ConfigError for others."""
    if name == "fcfs":
        return Fcfs()
    if name == "skip-join-mlfq":
        return SkipJoinMlfq(mlfq or Mlfq(), cost or CostTracker())
    raise ConfigError(f"--policy {name}: unknown; there are fcfs and skip-join-mlfq")


def policy_from(config: SchedulingConfig, cost: CostTracker) -> Policy:
    """The policy that a worker's configuration names."""
    mlfq = Mlfq(
        levels=config.mlfq_levels,
        quantum=config.mlfq_quantum,
        ratio=config.mlfq_ratio,
        promote_after=config.mlfq_promote_after,
    )
    return make_policy(config.policy, mlfq=mlfq, cost=cost)
