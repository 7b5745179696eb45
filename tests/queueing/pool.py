"""Gateways and workers of one pool, on a clock that tests move."""

from __future__ import annotations

from itertools import count

from baton.types import Load
from queueing.contract import Claimed, Registration, Role, Submission, WorkerRecord
from queueing.redis_queue import RedisGatewayQueue, RedisWorkerQueue
from queueing.settings import QueueSettings

FEW_LEVELS = QueueSettings(policy="skip-join-mlfq", levels=5, quantum=0.05, ratio=4.0)
FCFS = QueueSettings(policy="fcfs", levels=1, fairness_slack=0.5)
IDLE = Load(running=0, waiting=0, free_blocks=8, total_blocks=8)


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Pool:
    """Gateways and workers of one pool, closed together."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name, self.clock = url, name, Clock()
        self.queues: dict[str, RedisWorkerQueue] = {}
        self._open: list[RedisGatewayQueue | RedisWorkerQueue] = []

    async def gateway(self, id: str, settings: QueueSettings = FEW_LEVELS) -> RedisGatewayQueue:
        queue = RedisGatewayQueue(self.url, self.name, id, settings, clock=self.clock)
        self._open.append(queue)
        await queue.heartbeat()
        return queue

    async def worker(
        self, id: str, role: Role = Role.PREFILL, capacity_tokens: int = 1000
    ) -> RedisWorkerQueue:
        registration = Registration(
            id=id,
            role=role,
            address=f"{id}:1",
            layout_digest="layout",
            model="fingerprint",
            capacity_tokens=capacity_tokens,
            capacity_blocks=8,
            max_context=4096,
            weight_dtype="int8",
            kv_dtype="bfloat16",
        )
        queue = RedisWorkerQueue(self.url, self.name, registration, clock=self.clock)
        self._open.append(queue)
        self.queues[id] = queue
        await queue.register()
        return queue

    async def close(self) -> None:
        for queue in self._open:
            await queue.close()


def request(id: str, prompt_tokens: int = 10, **more: int | float) -> Submission:
    return Submission(id, "tenant", prompt_tokens, 100, **more)  # type: ignore[arg-type]


async def record(queue: RedisGatewayQueue, id: str) -> WorkerRecord:
    return next(worker for worker in await queue.workers() if worker.id == id)


class Line:
    """One gateway, one worker without bounds, and requests that come one after the other."""

    def __init__(self, cluster: Pool, gateway: RedisGatewayQueue) -> None:
        self.cluster, self.gateway = cluster, gateway
        self.claims: dict[str, Claimed] = {}
        self._numbers = count()

    @classmethod
    async def of(cls, cluster: Pool, settings: QueueSettings) -> Line:
        gateway = await cluster.gateway("g", settings)
        await cluster.worker("p", capacity_tokens=10**9)
        await cluster.worker("d", Role.DECODE, capacity_tokens=10**9)
        return cls(cluster, gateway)

    async def come(
        self, tenant: str, *, prompt: int = 10, cost: float = 0.5, **more: float | int
    ) -> str:
        """A request, named by tenant and number."""
        id = f"{tenant}{next(self._numbers)}"
        self.cluster.clock.now += 0.0001
        await self.gateway.submit(Submission(id, tenant, prompt, 100, cost=cost, **more))  # type: ignore[arg-type]
        return id

    async def take(self, most: int, worker: str = "p") -> list[str]:
        """Claim so many, one by one."""
        out: list[str] = []
        while len(out) < most:
            claimed = await self.gateway.claim(await record(self.gateway, worker), 1)
            if not claimed:
                break
            self.claims[claimed[0].request_id] = claimed[0]
            out.append(claimed[0].request_id)
        return out

    async def take_together(self, most: int) -> list[str]:
        """Claim so many in one call."""
        target = await record(self.gateway, "p")
        return [one.request_id for one in await self.gateway.claim(target, most)]
