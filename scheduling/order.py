"""Which sequence comes first. Policies are chosen by name, so that one can be swapped for another
on the same engine."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Items
from typing import Protocol

from baton.config import SchedulingConfig
from baton.errors import ConfigError
from scheduling.cost import CostTracker
from scheduling.mlfq import Mlfq, MlfqPolicy, SkipJoinMlfq
from scheduling.sequence import Rank, Sequence, Standing
from scheduling.srpt import PredictedSrpt, SrptOracle

NAMES = ("fcfs", "mlfq", "skip-join-mlfq", "predicted-srpt", "srpt-oracle")
"""Of all policies. The last one knows the future: it is for experiments."""


class Policy(Protocol):
    """An order over sequences. It alone sets what a Sequence keeps for its policy. With several
    tenants it is the order of each one's, see scheduling/shares.py."""

    preempts: bool
    """Whether a newcomer may take the place of one that runs, in its priority class."""

    def join(self, sequence: Sequence, tokens: int, now: float) -> None:
        """It has arrived, with `tokens` to compute here before its next one is sampled."""
        ...

    def rank(self, sequence: Sequence) -> Rank:
        """Its place, kept in `sequence.rank`. Changes only through the other methods."""
        ...

    def charge(self, sequence: Sequence, seconds: float, now: float, passes: int = 1) -> None:
        """A pass that took `seconds` and ended `now` had the sequence in it; or `passes` of them
        in a row that took `seconds` together, no more than `steady` had said. The same sequences
        are charged with what ended at the same time."""
        ...

    def promote(self, sequences: Collection[Sequence], now: float) -> None:
        """Called before each plan with everything that can run."""
        ...

    def next_run(self, ranked: Items[Sequence], slots: int, now: float) -> list[float]:
        """Estimated seconds until each of `ranked`, in rank order, is in a batch of `slots`
        sequences (FastServe's ENST); 0 for the first `slots`. An estimate: orders swaps only."""
        ...

    def steady(
        self,
        chosen: Iterable[Sequence],
        others: Iterable[Sequence],
        now: float,
        pass_seconds: float,
    ) -> float:
        """Seconds of service that all of `chosen`, and none of `others`, can get from `now` on, a
        token in every `pass_seconds`, before any of the one group may fall behind any of the
        other, or come before it, by that alone. `others` are in rank order, best first. May be
        too small, never too large."""
        ...


class Fcfs:
    """First come, first served, within a priority class."""

    preempts = False

    def join(self, sequence: Sequence, tokens: int, now: float) -> None:
        """Its arrival alone says where it stands."""
        request = sequence.request
        sequence.rank = (
            -request.priority,
            Standing.ORDINARY,
            0.0,
            sequence.arrived_at,
            request.id,
            sequence.index,
        )

    def rank(self, sequence: Sequence) -> Rank:
        """By arrival."""
        if sequence.rank is None:
            self.join(sequence, 0, 0.0)
        assert sequence.rank is not None
        return sequence.rank

    def charge(self, sequence: Sequence, seconds: float, now: float, passes: int = 1) -> None:
        """Service changes nothing."""

    def promote(self, sequences: Collection[Sequence], now: float) -> None:
        """Nobody can be overtaken, so nobody starves."""

    def next_run(self, ranked: Items[Sequence], slots: int, now: float) -> list[float]:
        """Nothing is known of lengths: by position."""
        return [float(max(0, place - slots + 1)) for place in range(len(ranked))]

    def steady(
        self,
        chosen: Iterable[Sequence],
        others: Iterable[Sequence],
        now: float,
        pass_seconds: float,
    ) -> float:
        """Service changes nothing."""
        return math.inf


def make_policy(
    name: str,
    *,
    mlfq: Mlfq | None = None,
    cost: CostTracker | None = None,
    aging: float = 1.0,
) -> Policy:
    """The policy called `name`, one of NAMES. `aging` is the knob of predicted-srpt. Raises
    ConfigError for other names."""
    mlfq, cost = mlfq or Mlfq(), cost or CostTracker()
    if name == "fcfs":
        return Fcfs()
    if name == "mlfq":
        return MlfqPolicy(mlfq, cost)
    if name == "skip-join-mlfq":
        return SkipJoinMlfq(mlfq, cost)
    if name == "predicted-srpt":
        return PredictedSrpt(mlfq, cost, aging=aging)
    if name == "srpt-oracle":
        return SrptOracle(cost)
    raise ConfigError(f"--policy {name}: unknown; there are {', '.join(NAMES)}")


def policy_from(config: SchedulingConfig, cost: CostTracker) -> Policy:
    """The policy that a worker's configuration names."""
    mlfq = Mlfq(
        levels=config.mlfq_levels,
        quantum=config.mlfq_quantum,
        ratio=config.mlfq_ratio,
        promote_after=config.mlfq_promote_after,
    )
    return make_policy(config.policy, mlfq=mlfq, cost=cost, aging=config.srpt_aging)
