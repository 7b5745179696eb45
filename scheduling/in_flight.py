"""The plans that were made and not applied yet: as many at a time as the pipeline has stages.

Each takes other sequences than the ones before it, so they may run at the same time, one in each
stage (FastServe, on pipeline parallelism: a stage that is free takes the job of highest priority
that no other stage is working on). They end in the order in which they began.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from scheduling.plan import StepPlan

Member = TypeVar("Member")


class InFlight(Generic[Member]):
    """Plans in flight, and what is in them: sequences, or what stands for one in its scheduler.

    A member is in one plan at most, and nobody changes it or takes its blocks before that is
    applied.
    """

    def __init__(self, depth: int) -> None:
        """`depth`: most plans at a time."""
        self.depth = depth
        self.members: set[Member] = set()
        self._plans: deque[tuple[StepPlan, tuple[Member, ...]]] = deque()  # oldest first
        self._doomed: dict[Member, None] = {}

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def doomed(self) -> list[Member]:
        """Those that end with their pass, in the order in which they were given up."""
        return list(self._doomed)

    def require_room(self) -> None:
        """Raise RuntimeError if there are as many plans as may be."""
        if len(self._plans) >= self.depth:
            raise RuntimeError("the last plan was not applied")

    def require_newest(self, plan: StepPlan) -> None:
        """Raise RuntimeError if this plan is not the one that was made last."""
        if not self._plans or self._plans[-1][0] is not plan:
            raise RuntimeError("this plan does not run")

    def share(self, running: int) -> int:
        """How many of so many running members, those in flight included, one plan may take: the
        first would leave nothing to the others if it took whoever is free. Counted over all of
        them, so that plans of unequal size, as members come and go, are even again one pass
        later; over the free ones alone, a plan would take back whoever was in it before."""
        return max(1, -(-running // self.depth))

    def begin(self, plan: StepPlan, members: tuple[Member, ...]) -> None:
        """A plan was made. There must be room, and nobody of it in another."""
        self._plans.append((plan, members))
        self.members.update(members)

    def end(self, plan: StepPlan) -> tuple[tuple[Member, ...], list[Member]]:
        """The oldest plan is over: its members in their order, and those of them that were given
        up meanwhile. Raises RuntimeError for any other."""
        if not self._plans or self._plans[0][0] is not plan:
            raise RuntimeError("this plan does not run, or others began before it")
        _, members = self._plans.popleft()
        self.members.difference_update(members)
        if not self._doomed:
            return members, []
        given_up = [member for member in self._doomed if member not in self.members]
        for member in given_up:
            del self._doomed[member]
        return members, given_up

    def give_up(self, member: Member) -> bool:
        """Let it end with its pass. False if it is in none."""
        if member not in self.members:
            return False
        self._doomed[member] = None
        return True
