"""The gateways' queue, as far as it is simulated: by priority, level and arrival.

The real one (queueing/lua) also has tenants that take turns, deadlines, promotion, and the handicap
of predicted-srpt, which here waits by arrival.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from scheduling.cost import LinearCost
from scheduling.mlfq import Mlfq
from scheduling.simulator.traffic import Job


@dataclass(frozen=True, slots=True)
class QueueOrder:
    """The rules. `policy` as in the configuration; `mlfq` and `cost` give the skip-join level."""

    policy: str = "fcfs"
    mlfq: Mlfq = field(default_factory=Mlfq)
    cost: LinearCost = field(default_factory=LinearCost)

    def level(self, job: Job) -> int:
        """The level that a job joins."""
        if self.policy == "skip-join-mlfq":
            return self.mlfq.first_level(self.cost.first_iteration(job.prompt_tokens))
        return 0


class WaitingQueue:
    """Jobs in the order in which they will be claimed."""

    def __init__(self, order: QueueOrder) -> None:
        self._order = order
        self._heap: list[tuple[int, int, float, int, Job]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, job: Job) -> None:
        """A job waits; it stands where its arrival puts it, also when it comes back."""
        self._number += 1
        rank = (-job.priority, self._order.level(job), job.arrived_at, self._number, job)
        heapq.heappush(self._heap, rank)

    def peek(self) -> Job:
        """The next one. IndexError if nothing waits."""
        return self._heap[0][-1]

    def pop(self) -> Job:
        """Take the next one."""
        return heapq.heappop(self._heap)[-1]
