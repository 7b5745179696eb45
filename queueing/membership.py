"""A worker's time in the cluster: registration, reports, and an orderly departure."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from baton.config import WorkerConfig
from baton.errors import QueueError
from baton.process import Background, unique_id, until_stopped
from baton.rate import Rate
from baton.rpc import Server
from baton.types import Load
from queueing.contract import Progress, Registration, Role, Verdict
from queueing.redis_queue import RedisWorkerQueue
from queueing.reporter import Reporter
from scheduling.plan import Capacity

log = logging.getLogger(__name__)

_DRAIN_POLL_SECONDS = 0.02


class Engine(Protocol):
    """What runs a worker's passes."""

    steps: int  # since the start


class Member(Protocol):
    """A worker, as its membership sees it: a PrefillWorker or a DecodeWorker."""

    draining: bool

    @property
    def engine(self) -> Engine:
        """Its engine."""
        ...

    @property
    def idle(self) -> bool:
        """Nothing is held that a departure would cut."""
        ...

    def progress(self) -> list[Progress]:
        """What it holds under claims."""
        ...

    def load(self) -> Load:
        """How busy it is."""
        ...

    def drop(self, progress: Progress, verdict: Verdict) -> None:
        """A request is no longer its own."""
        ...


class Layout(Protocol):
    """A worker's KV layout, as the registry has it: a kv_transfer.contract.KvLayout."""

    @property
    def digest(self) -> str:
        """The same for workers that can hand KV to each other."""
        ...

    @property
    def dtype(self) -> str:
        """Number format of the KV."""
        ...


def registration(
    config: WorkerConfig,
    role: Role,
    address: str,
    model: str,
    layout: Layout,
    capacity: Capacity,
    *,
    weight_dtype: str,
    capacity_tokens: int,
    max_context: int,
    batch_sequences: int | None = None,
) -> Registration:
    """What a worker says of itself. `model` is the fingerprint of what it runs; what comes after
    `capacity` is how much of it gateways may claim."""
    return Registration(
        id=config.worker_id or unique_id(role.value),
        role=role,
        address=address,
        layout_digest=layout.digest,
        model=model,
        capacity_tokens=capacity_tokens,
        capacity_blocks=capacity.blocks,
        max_context=max_context,
        weight_dtype=weight_dtype,
        kv_dtype=layout.dtype,
        batch_sequences=batch_sequences,
        prefix_block_size=capacity.block_size if config.prefix_cache else 0,
    )


class Membership:
    """`join` the cluster, then `leave` it."""

    def __init__(
        self,
        worker: Member,
        server: Server,
        services: Sequence[str],
        registration: Registration,
        config: WorkerConfig,
    ) -> None:
        self._worker, self._server, self._services = worker, server, services
        self._name = registration.id
        self._steps = Rate()
        self._background = Background()
        self._queue = RedisWorkerQueue(
            config.redis_url.get_secret_value(),
            config.pool,
            registration,
            worker_ttl=config.worker_ttl,
        )
        self._reporter = Reporter(
            self._queue,
            interval=config.report_interval,
            settle=config.worker_ttl,
            collect=worker.progress,
            load=self._load,
            drop=worker.drop,
        )

    async def join(self) -> None:
        """Answer RPCs; SERVING once the registry knows this worker, however long that takes."""
        await self._server.start(self._services)
        await self._reporter.register()
        self._background.start(self._reporter.run(), "reports")
        await self._server.serving()
        log.info("%s serves at %s", self._name, self._server.address)

    async def leave(self, drain_seconds: float) -> None:
        """Take nothing new, give what runs `drain_seconds`, then cut it: gateways move their
        requests elsewhere."""
        await self._server.not_serving()
        await self._drain(drain_seconds)
        await self._background.stop()
        try:
            await self._queue.deregister()
        except QueueError as error:
            log.warning("left without telling the registry: %s", error)
        await self._queue.close()
        await self._server.stop(0)

    def _load(self) -> Load:
        rate = self._steps.update(self._worker.engine.steps, time.monotonic())
        return replace(self._worker.load(), steps_per_second=rate)

    async def _drain(self, seconds: float) -> None:
        self._worker.draining = True
        try:
            await self._queue.drain()
        except QueueError as error:
            log.warning("the registry was not told of the drain: %s", error)
        try:
            async with asyncio.timeout(seconds):
                while not self._worker.idle:  # noqa: ASYNC110 # a departure is in no hurry
                    await asyncio.sleep(_DRAIN_POLL_SECONDS)
        except TimeoutError:
            log.warning("still busy after %g s: what runs is cut", seconds)


class Process(Protocol):
    """A worker process: made, started, stopped."""

    async def start(self) -> None:
        """Begin to serve."""
        ...

    async def broken(self) -> None:
        """Raise what broke the engine, if something does."""
        ...

    async def stop(self, drain_seconds: float) -> None:
        """Leave, then let go of everything."""
        ...


async def run(process: Process, drain_seconds: float) -> None:
    """Run until SIGINT, SIGTERM or a broken engine, whose error is raised."""
    started = asyncio.create_task(process.start(), name="start")
    stopped = asyncio.create_task(until_stopped(), name="signals")
    await asyncio.wait({started, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if started.done():
        broken = asyncio.create_task(process.broken(), name="engine")
        await asyncio.wait({broken, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if broken.done():
            drain_seconds = 0
    log.info("leaving")
    for task in (started, stopped):
        task.cancel()
    await process.stop(drain_seconds)
    for task in (started, stopped):
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await process.broken()
