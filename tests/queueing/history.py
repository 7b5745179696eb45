"""What can be done to a pool: each operation to the server and to the model, with equal answers."""

from __future__ import annotations

import asyncio
import random
import uuid
from typing import Any

import pytest
from redis.asyncio import Redis

from baton.errors import AlreadyExists, Overloaded
from baton.types import Claim, Load
from queueing import keys
from queueing.contract import Live, Outcome, Progress, Registration, Role, Submission, WorkerRecord
from queueing.redis_queue import RedisGatewayQueue, RedisWorkerQueue
from queueing.scripts import Scripts
from tests.queueing.reference import SECOND, SETTINGS, WORKER_TTL, Entry, Reference, Worker

GATEWAYS = ("g1", "g2")
ROLES = {"p1": Role.PREFILL, "p2": Role.PREFILL, "d1": Role.DECODE}
CAPACITY = 400
COUNTS_ONLY = {"promote", "reap", "reconcile"}  # these say how much this call did


class Repeating(Scripts):
    """Calls every script twice, as after a lost reply, and holds both answers to be equal."""

    repeat = False

    async def run(self, name: str, *arguments: str | int | float) -> Any:
        first = await super().run(name, *arguments)
        if not self.repeat:
            return first
        again = await super().run(name, *arguments)
        assert name in COUNTS_ONLY or again == first, name
        return first


class History:
    """Every rule does one thing to the server and to the model and compares the answers."""

    def __init__(self, url: str, seed: int) -> None:
        self.url, self.random = url, random.Random(seed)
        self.model = Reference()
        self.runner = asyncio.Runner()
        self.pool = f"machine-{uuid.uuid4().hex[:8]}"
        self.raw = Redis.from_url(self.url, decode_responses=True)
        self.gateways = {
            g: RedisGatewayQueue(self.url, self.pool, g, SETTINGS, clock=self.clock)
            for g in GATEWAYS
        }
        self.workers = {w: self.worker_queue(w) for w in ROLES}
        self.scripts = [
            self.repeating(q) for q in (*self.gateways.values(), *self.workers.values())
        ]
        self.records: dict[str, list[WorkerRecord]] = {w: [] for w in ROLES}
        self.fences: dict[str, list[int]] = {}
        self.epochs: set[int] = set()
        self.given_back: dict[str, list[int]] = {}

    def clock(self) -> float:
        return self.model.now / SECOND

    def worker_queue(self, worker: str) -> RedisWorkerQueue:
        registration = Registration(worker, ROLES[worker], "h:1", "l", "m", CAPACITY, 8, 4096)
        return RedisWorkerQueue(
            self.url, self.pool, registration, worker_ttl=WORKER_TTL, clock=self.clock
        )

    def repeating(self, queue: RedisGatewayQueue | RedisWorkerQueue) -> Repeating:
        queue._scripts = scripts = Repeating(self.url, self.pool, self.clock)
        return scripts

    def pick(self, n: int) -> Entry | None:
        """Any request, but claimed ones twice as often: things happen to those."""
        everything = [*self.model.requests.values()]
        claimed = [r for r in everything if r.claimed]
        candidates = claimed if claimed and n % 3 else everything
        return candidates[n // 3 % len(candidates)] if candidates else None

    def fence_of(self, r: Entry, back: int) -> int:
        known = self.fences.get(r.id, [1])
        return known[max(0, len(known) - 1 - back)]

    def note_fence(self, id: str, fence: int) -> None:
        assert all(fence > old for old in self.fences.get(id, []))
        self.fences.setdefault(id, []).append(fence)

    def record(self, worker: str, back: int) -> WorkerRecord | None:
        known = self.records[worker]
        return known[max(0, len(known) - 1 - back)] if known else None

    # Time and faults of the network

    def everybody_starts(self) -> None:
        for gateway in GATEWAYS:
            self.heartbeat(gateway)
        for worker in ROLES:
            self.worker_comes_and_goes(worker, "register")

    def time_passes(self, seconds: float, silent: str) -> None:
        self.model.now += int(seconds * SECOND)
        for gateway in GATEWAYS:
            if gateway != silent:
                self.heartbeat(gateway)
        for worker in ROLES:
            if worker != silent:
                self.report(worker, [])

    def network_changes(self, lost: bool, flushed: bool) -> None:
        for scripts in self.scripts:
            scripts.repeat = lost
        if flushed:
            self.runner.run(self.raw.script_flush())

    def heartbeat(self, gateway: str) -> None:
        known = self.model.heartbeat(gateway)
        assert self.runner.run(self.gateways[gateway].heartbeat()) == known

    # Gateways

    def submit(
        self,
        gateway: str,
        tenant: str,
        prompt: int,
        cached: int,
        priority: int,
        ttl: float | None,
        reuse: bool,
        handicap: float,
        cost: float,
        predicted: int | None,
        token_cost: float,
        expected: int,
    ) -> None:
        model = self.model
        count = len(model.requests)
        id = f"r{count - 1 if reuse and count else count}"
        cached = min(cached, prompt - 1)
        submission = Submission(
            id,
            tenant,
            prompt,
            4,
            cached,
            priority,
            ttl,
            handicap,
            cost,
            predicted,
            token_cost,
            expected,
        )
        deadline = None if ttl is None else model.now + int(ttl * SECOND)
        new = Entry(id, gateway, tenant, priority, prompt, cached, deadline, model.now, 0)
        new.due = model.now + int(handicap * SECOND)
        new.cost, new.predicted = int(cost * SECOND), predicted
        new.token_cost, new.expected, new.longest = int(token_cost * SECOND), expected, 4
        call = self.gateways[gateway].submit(submission)
        if id in model.requests and model.requests[id].live:
            with pytest.raises(AlreadyExists):
                self.runner.run(call)
        elif subject := model.refusal(tenant, prompt):
            with pytest.raises(Overloaded) as caught:
                self.runner.run(call)
            assert caught.value.subject == subject
            if gateway not in model.gateways:
                model.heartbeat(gateway)
                model.lost.add(gateway)
        else:
            assert self.runner.run(call) == model.submit(gateway, new)

    def claim(self, gateway: str, worker: str, back: int, limit: int) -> None:
        self.do_claim(gateway, worker, back, limit)

    def claim_one(self, gateway: str, worker: str, n: int) -> None:
        waiting = sorted(r.id for r in self.model.waiting() if r.gateway == gateway)
        if waiting:
            self.do_claim(gateway, worker, 0, 1, waiting[n % len(waiting)])

    def look(self, gateway: str, limit: int) -> None:
        expected = self.model.next_up(gateway, limit)
        assert self.runner.run(self.gateways[gateway].next_up(limit)) == expected

    def claim_and_hand_off(self, gateway: str, worker: str, limit: int) -> None:
        for r in self.do_claim(gateway, worker, 0, limit):
            self.do_handoff(r, 0, 0)

    def do_claim(
        self, gateway: str, worker: str, back: int, limit: int, only: str | None = None
    ) -> list[Entry]:
        if (record := self.record(worker, back)) is None:
            return []
        expected = self.model.claimable(gateway, worker, record.epoch, limit, only)
        got = self.runner.run(self.gateways[gateway].claim(record, limit, only=only))
        assert [(c.request_id, c.level, c.generated, c.claim.attempt) for c in got] == [
            (r.id, r.level, r.generated, r.faults + 1) for r in expected
        ]
        state = "P" if record.role is Role.PREFILL else "D"
        for claimed, r in zip(got, expected, strict=True):
            self.note_fence(r.id, claimed.claim.fence)
            self.model.claim(r, worker, record.epoch, claimed.claim.fence, state)
        return expected

    def handoff(self, n: int, back: int, worker_back: int) -> None:
        if (r := self.pick(n)) is not None:
            self.do_handoff(r, back, worker_back)

    def do_handoff(self, r: Entry, back: int, worker_back: int) -> None:
        if (record := self.record("d1", worker_back)) is None:
            return
        fence = self.fence_of(r, back)
        target = self.model.workers.get("d1")
        again = r.state == "D" and r.handed == fence and r.worker == "d1"
        fresh = (
            r.state == "P"
            and r.fence == fence
            and target is not None
            and target.epoch == record.epoch
        )
        new = self.runner.run(self.gateways[r.gateway].handoff(r.id, Claim(fence), record))
        assert (new is not None) == (again or fresh)
        if again:
            assert new is not None and new.fence == r.fence
        elif new is not None:
            self.note_fence(r.id, new.fence)
            self.model.give(r, "d1", record.epoch, new.fence, state="D", tokens=0)
            r.handed = fence

    def give_back(self, n: int, back: int, tokens: int, fault: bool) -> None:
        if (r := self.pick(n)) is None:
            return
        fence = self.fence_of(r, back)
        call = self.gateways[r.gateway].give_back(r.id, Claim(fence), tokens, fault=fault)
        given_back_before = fence in self.given_back.get(r.id, []) and r.live
        if r.claimed and r.fence == fence:
            self.given_back[r.id] = [fence]
            r.generated = max(tokens, r.generated)
            self.model.requeue(r, fault=fault)
            assert self.runner.run(call) == (r.state == "Q")
        else:
            assert self.runner.run(call) == given_back_before

    def finish(self, n: int, back: int | None, outcome: Outcome, tokens: int) -> None:
        if (r := self.pick(n)) is None:
            return
        claim = None if back is None else Claim(self.fence_of(r, back))
        expected = r.live and (claim is None or (r.claimed and r.fence == claim.fence))
        call = self.gateways[r.gateway].finish(r.id, outcome, tokens, claim)
        assert self.runner.run(call) == expected
        if expected:
            self.model.end(r, outcome.value, tokens)

    def promote(self, gateway: str) -> None:
        expected = self.model.promote()
        assert self.runner.run(self.gateways[gateway].promote()) == expected

    def reap(self, gateway: str) -> None:
        expected = self.model.reap(gateway)
        got = self.runner.run(self.gateways[gateway].reap())
        news = {("Q", id) for id in got.requeued} | {("E", id) for id in got.failed}
        assert (set(got.workers), news, set(got.timed_out)) == expected

    def reconcile_changes_nothing(self, gateway: str) -> None:
        live = [
            Live(Submission(r.id, r.tenant, 7, 7), 1, 3, None, None)
            for r in self.model.requests.values()
            if r.live and r.gateway == gateway
        ]
        assert self.runner.run(self.gateways[gateway].reconcile(live)) == 0

    # Workers

    def worker_comes_and_goes(self, worker: str, how: str) -> None:
        getattr(self, how)(worker)

    def register(self, worker: str) -> None:
        for r in self.model.held(worker):
            self.model.requeue_and_tell(r, fault=True)
        epoch = self.runner.run(self.workers[worker].register())
        assert epoch not in self.epochs
        self.epochs.add(epoch)
        expires = self.model.now + int(WORKER_TTL * SECOND)
        self.model.workers[worker] = Worker(epoch, ROLES[worker].value, CAPACITY, expires)
        alive = self.runner.run(self.gateways["g1"].workers())
        self.records[worker] += [record for record in alive if record.id == worker]

    def report(self, worker: str, rows: list[tuple[int, int, int, float]]) -> None:
        chosen = [(r, row) for row in rows if (r := self.pick(row[0])) is not None]
        twice = self.workers[worker]._scripts.repeat  # type: ignore[attr-defined]
        if twice:  # an entry listed twice would be judged in between
            chosen = list({r.id: (r, row) for r, row in chosen}.values())
        progress = [Progress(r.id, self.fence_of(r, row[1]), row[2], row[3]) for r, row in chosen]
        got = self.runner.run(self.workers[worker].report(progress, Load(1, 2, 3, 4)))
        w = self.model.workers.get(worker)
        if w is None or w.epoch != self.workers[worker]._epoch:
            assert got is None
            return
        w.expires = self.model.now + int(WORKER_TTL * SECOND)
        assert got is not None
        for (r, _), entry, reply in zip(chosen, progress, got, strict=True):
            verdict = self.model.reported(worker, r, entry.fence, entry.generated, entry.served)
            assert (reply.verdict.value, reply.level) == (verdict, r.level)

    def drain(self, worker: str) -> None:
        self.runner.run(self.workers[worker].drain())
        if worker in self.model.workers:
            self.model.workers[worker].draining = True

    def deregister(self, worker: str) -> None:
        self.runner.run(self.workers[worker].deregister())
        if self.model.workers.pop(worker, None):
            for r in self.model.held(worker):
                self.model.requeue_and_tell(r, fault=False)

    # The end

    def teardown(self) -> None:
        try:
            self.runner.run(self.everything_ends())
        finally:
            self.runner.run(self.close())
            self.runner.close()

    async def everything_ends(self) -> None:
        """Nothing is left but the pool's few fixed keys, and what expires by itself."""
        for r in self.model.requests.values():
            await self.gateways[r.gateway].finish(r.id, Outcome.CANCELLED, 0)
        self.model.now += 10 * SECOND
        for gateway in (*self.gateways.values(), *self.gateways.values()):
            await gateway.heartbeat()
            await gateway.reap()
        left = []
        async for name in self.raw.scan_iter(f"{keys.prefix(self.pool)}*"):
            if await self.raw.ttl(name) < 0:
                left.append(name.removeprefix(keys.prefix(self.pool)))
        assert set(left) <= {"config", "fence", "counts", "gateways", "virtual"}
        assert set(await self.raw.hvals(keys.key(self.pool, "counts"))) <= {"0"}

    async def close(self) -> None:
        for queue in (*self.gateways.values(), *self.workers.values()):
            await queue.close()
        await self.raw.aclose()
        await self.raw.connection_pool.disconnect()
