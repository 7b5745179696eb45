"""Gateways and workers of one pool, on a clock that tests move."""

from __future__ import annotations

from baton.types import Load
from queueing.contract import Registration, Role, Submission, WorkerRecord
from queueing.redis_queue import RedisGatewayQueue, RedisWorkerQueue
from queueing.settings import QueueSettings

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

    async def gateway(self, id: str, settings: QueueSettings | None = None) -> RedisGatewayQueue:
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
            dtype="bfloat16",
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
