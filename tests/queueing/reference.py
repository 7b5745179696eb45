"""A model of the queue in plain Python: what the Lua scripts must do, without how.

Times are integers, in microseconds. Fences are not modelled but learned from the replies; a fence
that nobody was told is None, so that nothing matches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from queueing.settings import QueueSettings

SECOND = 1_000_000
SETTINGS = QueueSettings(
    levels=3,
    quantum=0.05,
    ratio=4.0,
    max_queued_requests=9,
    max_queued_tokens=2500,
    max_requests_per_tenant=7,
    max_attempts=2,
    gateway_ttl=20.0,
    keep_ended=3600.0,  # by the server's own clock, which goes on while a test does
)
WORKER_TTL = 5.0


@dataclass
class Entry:
    """A request."""

    id: str
    gateway: str
    tenant: str
    priority: int
    prompt: int
    cached: int
    deadline: int | None
    queued_at: int
    level: int
    due: int = 0
    cost: int = 1
    predicted: int | None = None
    token_cost: int = 0
    expected: int = 0
    longest: int = 0
    charged: int = 0
    era: int = 0
    urgent: bool = False
    state: str = "Q"
    spent: float = 0.0
    generated: int = 0
    faults: int = 0
    fence: int | None = None
    handed: int | None = None
    worker: str = ""
    epoch: int = 0
    tokens: int = 0
    served: float = 0.0
    lease: int = 0

    @property
    def live(self) -> bool:
        return self.state in "QPD"

    @property
    def claimed(self) -> bool:
        return self.state in "PD"

    @property
    def need(self) -> int:
        return max(1, self.prompt + self.generated - self.cached)

    def cost_at(self, generated: int) -> int:
        """What it costs with so many output tokens."""
        more = min(generated, self.longest) - self.expected
        return max(1, self.cost + self.token_cost * more)

    @property
    def cost_of_claim(self) -> int:
        return max(self.cost, self.cost_at(self.generated))

    @property
    def lane(self) -> tuple[int, str]:
        return (self.priority, self.tenant)

    @property
    def place(self) -> tuple[int, int, str]:
        """In its lane."""
        if self.urgent:
            assert self.deadline is not None
            return (0, self.deadline, self.id)
        return (self.level + 1, self.due, self.id)

    @property
    def urgent_at(self) -> float:
        if self.deadline is None:
            return float("inf")
        return self.deadline - int(SETTINGS.urgent_before * SECOND) - self.cost


@dataclass
class Worker:
    """A registered worker."""

    epoch: int
    role: str
    capacity: int
    expires: int
    draining: bool = False


@dataclass
class Reference:
    """The pool."""

    now: int = 1000 * SECOND
    requests: dict[str, Entry] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    gateways: dict[str, int] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    news: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    tags: dict[tuple[int, str], int] = field(default_factory=dict)  # service claimed, by lane
    eras: dict[tuple[int, str], int] = field(default_factory=dict)
    surplus: dict[tuple[int, str], int] = field(default_factory=dict)
    virtual: dict[int, int] = field(default_factory=dict)
    absorbed: int = 0  # corrections of an earlier era that changed less than they said

    def waiting(self) -> list[Entry]:
        """In no order."""
        return [r for r in self.requests.values() if r.state == "Q"]

    def lane_is_empty(self, lane: tuple[int, str]) -> bool:
        return not any(r.lane == lane for r in self.waiting())

    def walk(self) -> Iterator[tuple[Entry, Callable[[], None]]]:
        """Waiting requests as they are due. Calling the second part charges its lane, which
        moves the lane in what is to come, but not in the pool."""
        tags = dict(self.tags)
        left = self.waiting()
        slack = SETTINGS.fairness_slack * SECOND

        def turn(r: Entry) -> tuple[Any, ...]:
            slot, time, _ = r.place
            return (-r.priority, tags.get(r.lane, 0) // slack, slot, time, r.tenant, r.id)

        while left:
            heads = {}
            for r in sorted(left, key=lambda r: r.place):
                heads.setdefault(r.lane, r)
            one = min(heads.values(), key=turn)
            left.remove(one)

            def charge(r: Entry = one) -> None:
                tags[r.lane] = tags.get(r.lane, 0) + r.cost_of_claim

            yield one, charge

    def list(self, r: Entry, *, lift: bool) -> None:
        """Into the queue. Call before its state is Q."""
        if r.urgent_at <= self.now:
            r.urgent = True
        if lift and self.lane_is_empty(r.lane):
            tag, virtual = self.tags.get(r.lane, 0), self.virtual.get(r.priority, 0)
            self.eras[r.lane] = self.eras.get(r.lane, 0) + 1
            self.surplus[r.lane] = tag - virtual
            self.tags[r.lane] = max(tag, virtual)

    def forget_lane(self, lane: tuple[int, str]) -> None:
        if not any(r.live and r.lane == lane for r in self.requests.values()):
            for known in (self.tags, self.eras, self.surplus):
                known.pop(lane, None)

    def correct(self, r: Entry, cost: int) -> None:
        """Its lane pays `cost` for it, not what it has paid so far. What it paid in an earlier era
        may have been less than the lift that ended it."""
        change, r.charged = cost - r.charged, cost
        if r.era != self.eras.get(r.lane, 0):
            before = self.surplus[r.lane]
            self.surplus[r.lane] = before + change
            kept = max(0, before + change) - max(0, before)
            self.absorbed += kept != change
            change = kept
        self.tags[r.lane] += change

    def in_flight(self, worker: str) -> int:
        """Prompt tokens claimed for a worker and not through yet."""
        epoch = self.workers[worker].epoch
        mine = [r for r in self.requests.values() if r.worker == worker and r.epoch == epoch]
        return sum(r.tokens for r in mine if r.claimed)

    def heartbeat(self, gateway: str) -> bool:
        known = gateway in self.gateways and gateway not in self.lost
        self.gateways[gateway] = self.now + int(SETTINGS.gateway_ttl * SECOND)
        self.lost.discard(gateway)
        return known

    def refusal(self, tenant: str, prompt: int) -> str | None:
        """Subject of the Overloaded error that a submission gets."""
        waiting = self.waiting()
        if len(waiting) >= SETTINGS.max_queued_requests:
            return "queue"
        if sum(r.prompt for r in waiting) + prompt > SETTINGS.max_queued_tokens:
            return "queue tokens"
        live = [r for r in self.requests.values() if r.live and r.tenant == tenant]
        return "tenant requests" if len(live) >= SETTINGS.max_requests_per_tenant else None

    def first_level(self, uncached: int) -> int:
        s = SETTINGS
        cost = s.prefill_seconds_base + uncached * s.prefill_seconds_per_token
        covering = [level for level in range(s.levels) if s.quantum_of(level) >= cost]
        return covering[0] if covering else s.levels - 1

    def submit(self, gateway: str, new: Entry) -> int:
        if gateway not in self.gateways:
            self.heartbeat(gateway)
            self.lost.add(gateway)
        new.level = self.first_level(new.prompt - new.cached)
        self.list(new, lift=True)
        self.requests[new.id] = new
        return new.level

    def claimable(
        self, gateway: str, worker: str, epoch: int, limit: int, only: str | None = None
    ) -> list[Entry]:
        """What a claim must return: see GatewayQueue.claim."""
        w = self.workers.get(worker)
        if w is None or w.epoch != epoch or w.draining:
            return []
        used, out = self.in_flight(worker), list[Entry]()
        for r, charge in self.walk_live():
            mine = r.gateway == gateway
            if not mine or only in (None, r.id):
                if used and used + r.need > w.capacity:
                    break
                used += r.need
                if mine:
                    out.append(r)
            charge()
            if len(out) == limit:
                break
        return out

    def walk_live(self) -> Iterator[tuple[Entry, Callable[[], None]]]:
        """`walk`, without those whose gateway or deadline is gone."""
        for r, charge in self.walk():
            owner_dead = self.gateways.get(r.gateway, 0) <= self.now
            if not owner_dead and (r.deadline is None or r.deadline > self.now):
                yield r, charge

    def next_up(self, gateway: str, limit: int) -> list[str]:
        """See GatewayQueue.next_up."""
        out = list[str]()
        for r, charge in self.walk_live():
            charge()
            if r.gateway == gateway:
                out.append(r.id)
        return out[:limit]

    def claim(self, r: Entry, worker: str, epoch: int, fence: int, state: str) -> None:
        start = self.tags.get(r.lane, 0)
        r.charged, r.era = r.cost_of_claim, self.eras.get(r.lane, 0)
        self.tags[r.lane] = start + r.charged
        self.virtual[r.priority] = max(start, self.virtual.get(r.priority, 0))
        self.give(r, worker, epoch, fence, state=state, tokens=r.need)

    def give(
        self, r: Entry, worker: str, epoch: int, fence: int, *, state: str, tokens: int
    ) -> None:
        r.state, r.worker, r.epoch, r.fence = state, worker, epoch, fence
        r.tokens, r.served = tokens, 0.0
        r.lease = self.now + int(SETTINGS.lease_ttl * SECOND)

    def end(self, r: Entry, outcome: str, generated: int = 0) -> None:
        r.generated = max(generated, r.generated)
        if r.state == "Q":
            r.era = self.eras.get(r.lane, 0)
        if r.claimed or r.generated:
            self.correct(r, r.cost_at(r.generated))
        r.state = outcome
        self.forget_lane(r.lane)

    def requeue(self, r: Entry, *, fault: bool) -> None:
        r.faults += fault
        r.fence = None
        if fault and r.faults >= SETTINGS.max_attempts:
            self.end(r, "E")
            return
        self.tags[r.lane] -= r.charged
        r.charged, r.era = 0, self.eras.get(r.lane, 0)
        self.list(r, lift=False)
        r.state, r.worker, r.epoch, r.tokens = "Q", "", 0, 0

    def requeue_and_tell(self, r: Entry, *, fault: bool) -> None:
        self.requeue(r, fault=fault)
        self.news.setdefault(r.gateway, set()).add((r.state, r.id))

    def held(self, worker: str) -> list[Entry]:
        return [r for r in self.requests.values() if r.claimed and r.worker == worker]

    def reported(self, worker: str, r: Entry, fence: int, generated: int, served: float) -> str:
        """Verdict on one line of a worker's report, after charging it."""
        if not r.live:
            return "X"
        if r.worker != worker:
            return "=" if r.state == "P" and r.fence == fence else "S"
        if not (r.claimed and r.fence == fence) and not (r.state == "D" and r.handed == fence):
            return "S"
        if r.predicted is not None:
            while r.level < SETTINGS.levels - 1 and generated > r.predicted * 2**r.level:
                r.level += 1
        else:
            r.spent += max(0.0, served - r.served)
            while r.level < SETTINGS.levels - 1 and r.spent >= SETTINGS.quantum_of(r.level):
                r.spent -= SETTINGS.quantum_of(r.level)
                r.level += 1
        if generated > r.generated:
            r.tokens = 0
        r.generated, r.served = max(generated, r.generated), served
        self.correct(r, max(r.charged, r.cost_at(r.generated)))
        r.lease = self.now + int(SETTINGS.lease_ttl * SECOND)
        return "="

    def promote(self) -> int:
        near = [r for r in self.waiting() if not r.urgent and r.urgent_at <= self.now]
        for r in near:
            r.urgent = True
        old = self.now - int(SETTINGS.promote_after * SECOND)
        starved = [r for r in self.waiting() if r.level > 0 and r.queued_at <= old]
        for r in starved:
            r.level, r.spent = 0, 0.0
            r.urgent = r.urgent or r.urgent_at <= self.now
        return len(near) + len(starved)

    def reap(self, gateway: str) -> tuple[set[str], set[tuple[str, str]], set[str]]:
        """Expired workers, this gateway's news, its requests past their deadline."""
        workers = {id for id, w in self.workers.items() if w.expires <= self.now}
        for id in workers:
            del self.workers[id]
        for r in list(self.requests.values()):
            if r.claimed and (r.worker in workers or r.lease <= self.now):
                self.requeue_and_tell(r, fault=True)
        dead = {g for g, end in self.gateways.items() if end <= self.now and g != gateway}
        for r in self.requests.values():
            if r.live and r.gateway in dead:
                self.end(r, "C")
        for id in dead:
            del self.gateways[id]
            self.news.pop(id, None)
        mine = [r for r in self.requests.values() if r.live and r.gateway == gateway]
        late = {r.id for r in mine if r.deadline is not None and r.deadline <= self.now}
        return workers, self.news.pop(gateway, set()), late
