"""The gateways' queue in virtual time: jobs in the order of scheduling/fair_queue.py.

One gateway's timers are part of it. What is not: workers that leave with what they hold, attempts,
caps on what may wait.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from scheduling.cost import LinearCost
from scheduling.expected import ExpectedService
from scheduling.fair_queue import SECOND, FairQueue, QueueRules, Ticket
from scheduling.mlfq import Mlfq
from scheduling.simulator.traffic import Job

SWEEP_SECONDS = 0.5
"""Between two promotions and looks at deadlines, as in gateway/housekeeping.py."""


@dataclass(frozen=True, slots=True)
class QueueOrder:
    """The rules, named as in the configuration. `prefill` and `decode`: what the workers say that
    passes cost; None: what those of the cluster do. `aging`: the knob of predicted-srpt. Without
    `lanes` tenants share one, and the policy alone decides."""

    policy: str = "fcfs"
    mlfq: Mlfq = field(default_factory=Mlfq)
    prefill: LinearCost | None = None
    decode: LinearCost | None = None
    aging: float = 1.0
    lanes: bool = True
    fairness_slack: float = 0.5
    urgent_before: float = 2.0

    def measured(self, prefill: LinearCost, decode: LinearCost) -> QueueOrder:
        """The same with these costs, where none are given."""
        return replace(self, prefill=self.prefill or prefill, decode=self.decode or decode)

    def rules(self) -> QueueRules:
        """What the order goes by."""
        prefill = self.prefill or LinearCost()
        return QueueRules(
            mlfq=replace(self.mlfq, levels=1) if self.policy == "fcfs" else self.mlfq,
            skip_join=self.policy == "skip-join-mlfq",
            prefill_base=prefill.base,
            prefill_per_token=prefill.per_token,
            fairness_slack=self.fairness_slack,
            urgent_before=self.urgent_before,
        )

    def expected(self) -> ExpectedService:
        """What a gateway expects of requests, by what workers tell it (CostTracker.tell)."""
        prefill, decode = self.prefill or LinearCost(), self.decode or LinearCost()
        return ExpectedService(
            prefill.base,
            prefill.per_token,
            decode.base + decode.per_sequence,
            aging=self.aging if self.predicts else None,
        )

    @property
    def predicts(self) -> bool:
        """Whether the order counts on predicted lengths."""
        return self.policy == "predicted-srpt"


class WaitingQueue:
    """Jobs that wait or are claimed. Times in seconds; they must not go back."""

    def __init__(self, order: QueueOrder) -> None:
        self._order = order
        self._queue = FairQueue(order.rules())
        self._expected = order.expected()
        self._live: dict[str, tuple[Job, Ticket]] = {}
        self._arrivals = 0.0  # of all live ones together
        self._waiting: Counter[str] = Counter()  # jobs, by tenant
        self._tenants: Counter[str] = Counter()  # live ones
        self._deadlines: list[tuple[float, str]] = []
        self.sweep_at = 0.0  # when a timer runs out next
        self._head: Job | None = None  # as it was looked up last
        self._head_is_known = True

    def __len__(self) -> int:
        """Jobs that wait."""
        return len(self._queue)

    def push(self, job: Job, cached: int = 0) -> None:
        """A job arrives. So many tokens of its prompt need not be computed, as is expected."""
        order, expected = self._order, self._expected
        tokens = expected.tokens(job.estimate, job.max_tokens)
        uncached = job.prompt_tokens - cached
        service = expected.service(uncached, tokens)
        arrived = round(job.arrived_at * SECOND)
        ticket = Ticket(
            id=job.id,
            tenant=job.tenant if order.lanes else "",
            priority=job.priority,
            queued_at=arrived,
            due=arrived + round(expected.comes(service) * SECOND),
            cost=max(1, round(service * SECOND)),
            deadline=None if job.deadline is None else round(job.deadline * SECOND),
            predicted=round(tokens) if order.predicts else None,
            token_cost=round(expected.token_seconds * SECOND),
            expected=round(tokens),
            max_tokens=job.max_tokens,
        )
        self._live[job.id] = job, ticket
        self._tenants[ticket.tenant] += 1
        self._waiting[ticket.tenant] += 1
        self._arrivals += job.arrived_at
        self._head_is_known = False
        self._watch(job)
        self._queue.submit(ticket, uncached)

    def level(self, job: Job) -> int:
        """Its level now."""
        return self._live[job.id][1].level

    def first(self, now: float) -> Job | None:
        """The one that is claimed next; None if nobody waits whose deadline has not passed."""
        if self._head_is_known:
            return self._head
        ticket = self._queue.first(round(now * SECOND))
        self._head = None if ticket is None else self._live[ticket.id][0]
        self._head_is_known = not self._deadlines  # else it may be too late for it, next time
        return self._head

    @property
    def tenants(self) -> int:
        """How many have live jobs."""
        return len(self._tenants)

    @property
    def waiting_tenants(self) -> Collection[str]:
        """Those with jobs that wait."""
        return self._waiting.keys()

    def first_of(self, tenants: Collection[str], now: float) -> Job | None:
        """The one that is claimed next for a place that is open to these tenants only."""
        ticket = self._queue.first_of(tenants, round(now * SECOND))
        return None if ticket is None else self._live[ticket.id][0]

    def claim(self, job: Job) -> None:
        """A worker gets it."""
        self._head_is_known = False
        ticket = self._live[job.id][1]
        _less(self._waiting, ticket.tenant)
        self._queue.claim(ticket)

    def handed_over(self, job: Job) -> None:
        """It has gone from its prefill worker to its decode worker."""
        self._queue.handed_over(self._live[job.id][1])

    def progress(self, job: Job, generated: int, served: float) -> int:
        """Its worker reports output tokens in all and seconds of service there; returns its
        level."""
        self._head_is_known = False
        return self._queue.progress(self._live[job.id][1], generated, served)

    def give_back(self, job: Job, now: float) -> None:
        """A claimed one comes back, to its level and its place."""
        self._head_is_known = False
        ticket = self._live[job.id][1]
        self._waiting[ticket.tenant] += 1
        self._queue.give_back(ticket, round(now * SECOND))
        self._watch(job)

    def end(self, job: Job, generated: int = 0) -> None:
        """It has ended, wherever it was; complete, if it `generated` anything."""
        _, ticket = self._live.pop(job.id)
        _less(self._tenants, ticket.tenant)
        if ticket.waiting:
            _less(self._waiting, ticket.tenant)
        self._arrivals = self._arrivals - job.arrived_at if self._live else 0.0
        if generated:
            self._expected.ended(generated)
        self._head_is_known = False
        self._queue.end(ticket, generated)

    def tick(self, now: float) -> list[Job]:
        """`sweep`, at the last time at which a timer ran out."""
        self.sweep_at = (now // SWEEP_SECONDS + 1) * SWEEP_SECONDS
        return self.sweep(self.sweep_at - SWEEP_SECONDS)

    def sweep(self, now: float) -> list[Job]:
        """What a gateway's timers do: promote, look at ages and at deadlines. Returns those that
        waited past theirs; they have ended."""
        self._head_is_known = False
        live = len(self._live)
        self._expected.mean_age((now * live - self._arrivals) / live if live else None, now)
        self._queue.promote(round(now * SECOND))
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, id = heapq.heappop(self._deadlines)
            job, ticket = self._live.get(id, (None, None))
            if job and ticket and ticket.waiting and job.deadline == deadline:
                late.append(job)
                self.end(job)
        return late

    def _watch(self, job: Job) -> None:
        if job.deadline is not None:
            heapq.heappush(self._deadlines, (job.deadline, job.id))


def _less(counts: Counter[str], tenant: str) -> None:
    """One less; tenants without any are not listed."""
    counts[tenant] -= 1
    if not counts[tenant]:
        del counts[tenant]
