"""The simulator's queue and the real one give the same order of claims in any history.

Jobs go to the one as they are; to the other as a gateway tells it of them (gateway/pace.py).
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from baton.config import GatewayConfig
from baton.types import LengthEstimate
from gateway.job import Job as GatewayJob
from gateway.pace import Pace
from queueing.contract import Claimed, Outcome, Progress, Role
from queueing.redis_queue import RedisGatewayQueue
from queueing.settings import QueueSettings
from scheduling.cost import LinearCost
from scheduling.mlfq import Mlfq
from scheduling.simulator.queue import QueueOrder, WaitingQueue
from scheduling.simulator.traffic import Job
from tests.queueing.pool import IDLE, Pool, record

STEPS = 150
MLFQ = Mlfq(levels=4, quantum=0.0625, ratio=2.0, promote_after=3.0)
COST = LinearCost(base=0.0625, per_token=0.001953125, per_sequence=0.0)

# What can happen, and how often.
RULES = {
    "time_passes": 4,
    "submit": 8,
    "claim": 5,
    "claim_several": 1,
    "hand_over": 1,
    "report": 5,
    "give_back": 4,
    "end": 2,
    "sweep": 2,
}


class Both:
    """Every operation on both queues, which must answer alike."""

    def __init__(self, pool: Pool, policy: str, seed: int) -> None:
        self.pool, self.policy, self.random = pool, policy, random.Random(seed)
        self.order = QueueOrder(policy, MLFQ, COST, COST)
        self.simulated = WaitingQueue(self.order)
        self.pace = Pace(
            GatewayConfig(
                policy=policy,
                prefill_seconds_base=COST.base,
                prefill_seconds_per_token=COST.per_token,
                token_seconds=COST.base,
            )
        )
        self.waiting: dict[str, Job] = {}
        self.claimed: dict[str, tuple[Job, Claimed, str]] = {}  # and by which worker
        self.claims = 0
        self.numbers = 0

    async def start(self) -> None:
        settings = QueueSettings(
            policy=self.policy,  # type: ignore[arg-type]
            levels=1 if self.policy == "fcfs" else MLFQ.levels,
            quantum=MLFQ.quantum,
            ratio=MLFQ.ratio,
            promote_after=MLFQ.promote_after,
            prefill_seconds_base=COST.base,
            prefill_seconds_per_token=COST.per_token,
            lease_ttl=1e6,
            gateway_ttl=1e6,
        )
        self.real: RedisGatewayQueue = await self.pool.gateway("g", settings)
        for name, role in (("p", Role.PREFILL), ("d", Role.DECODE)):
            await self.pool.worker(name, role, capacity_tokens=10**9)

    @property
    def now(self) -> float:
        return self.pool.clock.now

    async def step(self) -> None:
        [name] = self.random.choices([*RULES], [*RULES.values()])
        await getattr(self, name)()

    async def time_passes(self) -> None:
        self.pool.clock.now += self.random.choice([1 / 1024, 1 / 64, 0.25, 1.0, 3.5])
        for queue in self.pool.queues.values():
            await queue.report([], IDLE)  # workers stay alive

    async def submit(self) -> None:
        draw = self.random.choice
        length = draw([None, 1, 10, 60, 400])
        deadline = draw([None, None, None, 3.0, 6.0, 40.0])
        self.numbers += 1
        job = Job(
            id=f"r{self.numbers * 7919 % 1000:03d}-{self.numbers}",  # names that do not ascend
            arrived_at=self.now,
            prompt_tokens=draw([1, 30, 33, 200, 900]),
            output_tokens=1,
            max_tokens=300,
            estimate=None if length is None else LengthEstimate(length, length),
            tenant=draw("aaab") if self.random.random() < 0.9 else "a/c",
            priority=draw([0, 0, 0, 0, 2, -1]),
            deadline=None if deadline is None else self.now + deadline,
        )
        await self.come(job, deadline)

    async def come(self, job: Job, deadline: float | None = None) -> None:
        told = self.pace.submission(GatewayJob(job.request(), job.tenant, 30.0), deadline)
        self.simulated.push(job)
        assert await self.real.submit(told) == self.simulated.level(job)
        self.waiting[job.id] = job

    async def claim(self, most: int = 1) -> None:
        worker = self.random.choice("pd")
        got = await self.real.claim(await record(self.real, worker), most)
        expected = []
        while len(expected) < most and (job := self.simulated.first(self.now)) is not None:
            expected.append((job.id, self.simulated.level(job)))
            self.simulated.claim(job)
        assert [(one.request_id, one.level) for one in got] == expected
        assert len(self.simulated) == len(self.waiting) - len(got)
        for one in got:
            self.claimed[one.request_id] = self.waiting.pop(one.request_id), one, worker
        self.claims += len(got)

    async def claim_several(self) -> None:
        await self.claim(4)

    async def hand_over(self) -> None:
        held = [each for each in self.claimed.values() if each[2] == "p"]
        if held:
            job, one, _ = self.random.choice(held)
            claim = await self.real.handoff(job.id, one.claim, await record(self.real, "d"))
            assert claim is not None
            self.simulated.handed_over(job)
            self.claimed[job.id] = job, replace(one, claim=claim), "d"

    async def report(self) -> None:
        if not self.claimed:
            return
        job, one, worker = self.random.choice([*self.claimed.values()])
        generated = self.random.choice([1, 11, 50, 500])
        served = self.random.choice([0.0625, 0.1875, 0.5])
        queue = self.pool.queues[worker]
        entry = Progress(job.id, one.claim.fence, generated, served)
        [reply] = await queue.report([entry], IDLE) or []
        assert reply.level == self.simulated.progress(job, generated, served)

    async def give_back(self) -> None:
        if self.claimed:
            job, one, _ = self.claimed.pop(self.random.choice([*self.claimed]))
            assert await self.real.give_back(job.id, one.claim, 0, fault=False)
            self.simulated.give_back(job, self.now)
            self.waiting[job.id] = job

    async def end(self) -> None:
        everything = {**self.waiting, **{id: each[0] for id, each in self.claimed.items()}}
        if everything:
            job = everything[self.random.choice([*everything])]
            await self.finish(job, self.random.choice([0, 20, 250]))

    async def finish(self, job: Job, generated: int) -> None:
        assert await self.real.finish(job.id, Outcome.FINISHED, generated)
        if generated:
            self.pace.ended(generated)
        self.simulated.end(job, generated)
        self._forget(job.id)

    async def sweep(self) -> None:
        live = [*self.waiting.values(), *(each[0] for each in self.claimed.values())]
        self.pace.ages([self.now - job.arrived_at for job in live], self.now)
        await self.real.promote()
        late = set((await self.real.reap()).timed_out) & set(self.waiting)
        assert {job.id for job in self.simulated.sweep(self.now)} == late
        for id in late:
            assert await self.real.finish(id, Outcome.TIMED_OUT, 0)
            self._forget(id)

    def _forget(self, id: str) -> None:
        self.waiting.pop(id, None)
        self.claimed.pop(id, None)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", ["fcfs", "mlfq", "skip-join-mlfq", "predicted-srpt"])
async def test_any_history_gives_the_same_order_of_claims(cluster: Pool, policy: str, seed: int):
    both = Both(cluster, policy, seed)
    await both.start()
    for _ in range(STEPS):
        await both.step()
    while both.waiting and both.simulated.first(both.now):
        await both.claim()
    assert both.claims > STEPS / 6


async def test_what_an_idle_tenant_was_charged_too_much_is_the_same_in_both(cluster: Pool):
    both = Both(cluster, "fcfs", 0)
    await both.start()

    async def come(tenant: str, count: int, length: int) -> list[Job]:
        estimate = LengthEstimate(length, length)
        jobs = [
            Job(f"{tenant}{len(both.waiting)}-{i}", both.now, 10, 1, 300, estimate, tenant)
            for i in range(count)
        ]
        for job in jobs:
            await both.come(job)
        return jobs

    [early] = await come("b", 1, 80)
    await come("a", 40, 10)
    for _ in range(20):
        await both.claim()
    await come("b", 10, 10)
    await both.finish(early, 0)
    order = []
    for _ in range(12):
        known = set(both.claimed)
        await both.claim()
        order += [id[0] for id in set(both.claimed) - known]
    assert 4 <= order.count("b") <= 8
