"""The order of waiting requests: who is claimed next (docs/decisions/006-queue-order.md).

Priority first: each has a class of its own. In a class each tenant has a lane, in which the policy
decides, and lanes take turns by the service that their claims cost (start-time fair queueing):
what is expected, until the outputs tell more. Lanes whose tags are within the slack of each other
stand in the policy's order, too.

This is what queueing/lua keeps in Redis, for one process: tests hold that both give the same order.
It knows nothing of workers, fences and attempts. Times and costs are whole microseconds, as they
are there: what ties here ties there.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import count

from scheduling.mlfq import Mlfq

SECOND = 1_000_000

_Place = tuple[int, int, str]  # slot, time, id: of a request in its lane
_Turn = tuple[int, int, int, str]  # bucket, slot, time, tenant: of a lane in its class


@dataclass(frozen=True, slots=True)
class QueueRules:
    """What the order goes by; times in seconds.

    A tenant may have had `fairness_slack` of service more than others before its requests wait for
    theirs. A request is urgent from `urgent_before` before the last moment at which its expected
    service would still end by its deadline. With `skip_join` it joins the first level that covers
    `prefill_base` plus `prefill_per_token` for each uncached prompt token, else level 0.
    """

    mlfq: Mlfq = field(default_factory=Mlfq)
    skip_join: bool = False
    prefill_base: float = 0.005
    prefill_per_token: float = 0.0005
    fairness_slack: float = 0.5
    urgent_before: float = 2.0

    def first_level(self, uncached: int) -> int:
        """The level that a request joins with so many prompt tokens to compute."""
        if not self.skip_join:
            return 0
        return self.mlfq.first_level(self.prefill_base + uncached * self.prefill_per_token)


@dataclass(slots=True, eq=False)
class Ticket:
    """What the order knows of a request, from its submission to its end.

    The first fields are the caller's. `due` is `queued_at` and the time by which younger ones may
    pass; `cost` the service it is expected to take, at least 1; `predicted` its output tokens, if
    the order counts on them. `token_cost` is what each output token has in `cost`, which counts on
    `expected` of them; it has at most `max_tokens`. The others are the queue's: it alone changes
    them.
    """

    id: str
    tenant: str
    priority: int
    queued_at: int
    due: int
    cost: int
    deadline: int | None = None
    predicted: int | None = None
    token_cost: int = 0
    expected: int = 0
    max_tokens: int = 0

    level: int = 0
    served: float = 0.0  # seconds in its level, kept from worker to worker
    generated: int = 0
    reported: float = 0.0  # seconds of service by the worker that has it
    urgent: bool = False
    waiting: bool = False
    place: _Place | None = None
    charged: int = 0  # what its lane has paid for it
    era: int = 0  # of its lane, when it was claimed

    def cost_at(self, generated: int) -> int:
        """What it costs with so many output tokens."""
        more = min(generated, self.max_tokens) - self.expected
        return max(1, self.cost + self.token_cost * more)

    def overdue(self, now: int) -> bool:
        """Its deadline has passed: nobody claims it any more."""
        return self.deadline is not None and self.deadline <= now


class _Lane:
    """One tenant's waiting requests in one class. The heap may hold what waits no longer, or
    elsewhere, but not at its head."""

    __slots__ = ("era", "heap", "live", "surplus", "tag", "turn", "waiting")

    def __init__(self) -> None:
        self.tag = 0  # service that its claims cost
        self.era = 0  # how often it has come back to an empty queue
        self.surplus = 0  # its tag over the virtual time, when it came back last
        self.live = 0  # requests that have not ended
        self.turn: _Turn | None = None  # where it stands in its class, if anybody waits
        self.waiting: dict[str, Ticket] = {}
        self.heap: list[_Place] = []

    def head(self) -> _Place | None:
        """The place of its first request."""
        heap, waiting = self.heap, self.waiting
        while heap:
            ticket = waiting.get(heap[0][2])
            if ticket is not None and ticket.place == heap[0]:
                return heap[0]
            heapq.heappop(heap)
        return None


class _Class:
    """The lanes of one priority. `virtual` is the largest tag that a claim began with."""

    __slots__ = ("heap", "lanes", "priority", "virtual")

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.virtual = 0
        self.lanes: dict[str, _Lane] = {}
        self.heap: list[_Turn] = []

    def first_lane(self) -> _Lane | None:
        """The one whose turn it is."""
        heap = self.heap
        while heap:
            lane = self.lanes.get(heap[0][3])
            if lane is not None and lane.turn == heap[0]:
                return lane
            heapq.heappop(heap)
        return None


class FairQueue:
    """Tickets that wait or are claimed. Time must not go back."""

    def __init__(self, rules: QueueRules) -> None:
        self.rules = rules
        self._slack = max(1.0, rules.fairness_slack * SECOND)
        self._urgent_before = rules.urgent_before * SECOND
        self._promote_after = rules.mlfq.promote_after * SECOND
        self._classes: dict[int, _Class] = {}
        self._ranked: list[_Class] = []  # highest priority first
        self._length = 0
        self._numbers = count()
        self._deadlines: list[tuple[float, int, Ticket]] = []  # by when they turn urgent
        self._ages: list[tuple[float, int, Ticket]] = []  # of those below level 0, by arrival

    def __len__(self) -> int:
        """How many wait."""
        return self._length

    # -- The life of a ticket --------------------------------------------------------------

    def submit(self, ticket: Ticket, uncached: int) -> None:
        """A request comes, with so many prompt tokens to compute, at its `queued_at`."""
        ticket.level = self.rules.first_level(uncached)
        found = self._classes.get(ticket.priority)
        if found is None:
            found = self._classes[ticket.priority] = _Class(ticket.priority)
            self._ranked = sorted(self._classes.values(), key=lambda c: -c.priority)
        lane = found.lanes.get(ticket.tenant)
        if lane is None:
            lane = found.lanes[ticket.tenant] = _Lane()
        lane.live += 1
        if not lane.waiting:
            # Service that a tenant did not ask for cannot be saved up.
            lane.era += 1
            lane.surplus = lane.tag - found.virtual
            lane.tag = max(lane.tag, found.virtual)
        self._list(ticket, found, lane, ticket.queued_at)

    def first_of(self, tenants: Collection[str], now: int) -> Ticket | None:
        """The one that would be claimed next if nobody but these tenants waited."""
        for found in self._ranked:
            lanes = (found.lanes[name] for name in tenants if name in found.lanes)
            turns = [lane.turn for lane in lanes if lane.turn is not None]
            for turn in sorted(turns):
                lane = found.lanes[turn[3]]
                in_time = [t for t in lane.waiting.values() if not t.overdue(now)]
                if in_time:
                    return min(in_time, key=_place)
        return None

    def first(self, now: int) -> Ticket | None:
        """The one that is claimed next; None if nobody waits whose deadline has not passed."""
        for found in self._ranked:
            lane = found.first_lane()
            if lane is not None:
                ticket = lane.waiting[lane.heap[0][2]]
                if not ticket.overdue(now):
                    return ticket
                late = self._first_in_time(found, now)
                if late is not None:
                    return late
        return None

    def claim(self, ticket: Ticket) -> None:
        """A worker gets a waiting one: its lane pays, and it is off the queue."""
        found, lane = self._of(ticket)
        found.virtual = max(found.virtual, lane.tag)
        ticket.charged = max(ticket.cost, ticket.cost_at(ticket.generated))
        ticket.era = lane.era
        lane.tag += ticket.charged
        ticket.reported = 0.0
        self._unlist(ticket, lane)
        self._settle(found, lane, ticket.tenant)

    def handed_over(self, ticket: Ticket) -> None:
        """Another worker has it now, which counts its service from 0."""
        ticket.reported = 0.0

    def progress(self, ticket: Ticket, generated: int, served: float) -> int:
        """What the worker that has it reports: output tokens in all, seconds of service there.
        Returns its level. It sinks by quanta of service; where the order counts on a prediction,
        when it has outlived that, and again at each double. Its lane pays for output that was not
        expected."""
        mlfq = self.rules.mlfq
        if ticket.predicted is not None:
            most = mlfq.levels - 1
            while ticket.level < most and generated > ticket.predicted * 2**ticket.level:
                ticket.level += 1
        else:
            mlfq.charge(ticket, max(0.0, served - ticket.reported))
        ticket.generated = max(generated, ticket.generated)
        ticket.reported = served
        found, lane = self._of(ticket)
        if (cost := ticket.cost_at(ticket.generated)) > ticket.charged:
            self._correct(ticket, found, lane, cost)
        return ticket.level

    def give_back(self, ticket: Ticket, now: int) -> None:
        """A claimed one waits again: at its level, in its old place, and its lane is refunded."""
        found, lane = self._of(ticket)
        lane.tag -= ticket.charged
        ticket.charged = 0
        self._list(ticket, found, lane, now)

    def end(self, ticket: Ticket, generated: int = 0) -> None:
        """It has ended, waiting or claimed, with so many output tokens in all: that is what its
        lane pays for. A lane is forgotten with its last one."""
        found, lane = self._of(ticket)
        ticket.generated = max(generated, ticket.generated)
        if ticket.waiting:
            ticket.era = lane.era
            self._unlist(ticket, lane)
            self._settle(found, lane, ticket.tenant)
        if ticket.charged or ticket.generated:
            self._correct(ticket, found, lane, ticket.cost_at(ticket.generated))
        lane.live -= 1
        if not lane.live:
            del found.lanes[ticket.tenant]

    # -- Time passes -----------------------------------------------------------------------

    def promote(self, now: int) -> int:
        """Lift the urgent to the head of their lanes and those who came too long ago to level 0.
        Returns how many."""
        lifted = 0
        for ticket in self._due(self._deadlines, now):
            if not ticket.urgent:
                lifted += 1
                ticket.urgent = True
                self._move(ticket, now)
        for ticket in self._due(self._ages, now - self._promote_after):
            if ticket.level:
                lifted += 1
                ticket.level, ticket.served = 0, 0.0
                self._move(ticket, now)
        return lifted

    # -- Places and turns ------------------------------------------------------------------

    def _of(self, ticket: Ticket) -> tuple[_Class, _Lane]:
        found = self._classes[ticket.priority]
        return found, found.lanes[ticket.tenant]

    def _list(self, ticket: Ticket, found: _Class, lane: _Lane, now: int) -> None:
        ticket.waiting = True
        self._length += 1
        lane.waiting[ticket.id] = ticket
        self._put(ticket, found, lane, now)

    def _unlist(self, ticket: Ticket, lane: _Lane) -> None:
        ticket.waiting = False
        self._length -= 1
        del lane.waiting[ticket.id]

    def _move(self, ticket: Ticket, now: int) -> None:
        """Its place has changed."""
        self._put(ticket, *self._of(ticket), now)

    def _put(self, ticket: Ticket, found: _Class, lane: _Lane, now: int) -> None:
        if ticket.deadline is not None and not ticket.urgent:
            urgent_at = ticket.deadline - self._urgent_before - ticket.cost
            if urgent_at <= now:
                ticket.urgent = True
            else:
                heapq.heappush(self._deadlines, (urgent_at, next(self._numbers), ticket))
        if ticket.urgent:
            assert ticket.deadline is not None
            ticket.place = (0, ticket.deadline, ticket.id)
        else:
            ticket.place = (ticket.level + 1, ticket.due, ticket.id)
        heapq.heappush(lane.heap, ticket.place)
        if ticket.level and self._promote_after < math.inf:
            heapq.heappush(self._ages, (ticket.queued_at, next(self._numbers), ticket))
        self._settle(found, lane, ticket.tenant)

    def _correct(self, ticket: Ticket, found: _Class, lane: _Lane, cost: int) -> None:
        """Its lane pays `cost` for it, not what it has paid so far. Of what it did before it came
        back last only that counts which would have changed its tag then: else an idle tenant
        could save up what was charged too much."""
        change, ticket.charged = cost - ticket.charged, cost
        if ticket.era != lane.era:
            before = lane.surplus
            lane.surplus += change
            change = max(0, lane.surplus) - max(0, before)
        if change:
            lane.tag += change
            self._settle(found, lane, ticket.tenant)

    def _settle(self, found: _Class, lane: _Lane, tenant: str) -> None:
        """Put a lane where its head and its tag belong."""
        head = lane.head()
        if head is None:
            lane.turn = None
            return
        turn = (math.floor(lane.tag / self._slack), head[0], head[1], tenant)
        if turn != lane.turn:
            lane.turn = turn
            heapq.heappush(found.heap, turn)

    def _first_in_time(self, found: _Class, now: int) -> Ticket | None:
        """The first of a class, without those whose deadline has passed."""
        best: tuple[tuple[int, _Place, str], Ticket] | None = None
        for tenant, lane in found.lanes.items():
            in_time = [t for t in lane.waiting.values() if not t.overdue(now)]
            if in_time:
                ticket = min(in_time, key=_place)
                place = _place(ticket)
                key = (math.floor(lane.tag / self._slack), (*place[:2], tenant), ticket.id)
                if best is None or key < best[0]:
                    best = key, ticket
        return None if best is None else best[1]

    def _due(self, heap: list[tuple[float, int, Ticket]], now: float) -> Iterator[Ticket]:
        """Takes those off that are due, and names those that wait. Who does not is listed anew
        when it comes back."""
        while heap and heap[0][0] <= now:
            ticket = heapq.heappop(heap)[2]
            if ticket.waiting:
                yield ticket


def _place(ticket: Ticket) -> _Place:
    assert ticket.place is not None
    return ticket.place
