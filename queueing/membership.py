"""A worker's time in the cluster: registration, reports, and an orderly departure."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from baton.config import WorkerConfig
from baton.errors import QueueError
from baton.process import Background, until_stopped
from baton.rpc import Server
from baton.types import Load
from queueing.contract import Progress, Registration, Verdict
from queueing.redis_queue import RedisWorkerQueue
from queueing.reporter import Reporter

log = logging.getLogger(__name__)

_DRAIN_POLL_SECONDS = 0.02


class Engine(Protocol):
    """The part of a worker's EngineLoop that its departure waits for."""

    async def wait_closed(self) -> None:
        """Return or raise when the engine has stopped."""
        ...


class Member(Protocol):
    """A worker, as its membership sees it: a PrefillWorker or a DecodeWorker."""

    draining: bool

    @property
    def engine(self) -> Engine:
        """What ends the process if it breaks."""
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

    async def stop(self) -> None:
        """End everything it still holds."""
        ...


async def serve(
    worker: Member,
    server: Server,
    services: Sequence[str],
    registration: Registration,
    config: WorkerConfig,
) -> None:
    """Serve until SIGINT, SIGTERM or a broken engine, then drain and leave.

    SERVING only once the registry knows the worker. Draining gives what runs
    `config.drain_seconds`; then streams are cut and gateways move their requests elsewhere.
    Raises what broke the engine.
    """
    queue = RedisWorkerQueue(
        config.redis_url.get_secret_value(),
        config.pool,
        registration,
        worker_ttl=config.worker_ttl,
    )
    reporter = Reporter(
        queue,
        interval=config.report_interval,
        settle=config.worker_ttl,
        collect=worker.progress,
        load=worker.load,
        drop=worker.drop,
    )
    background = Background()
    stopped = asyncio.create_task(until_stopped(), name="signals")
    broken = asyncio.create_task(worker.engine.wait_closed(), name="engine")
    try:
        await server.start(services)
        registering = asyncio.create_task(reporter.register(), name="register")
        await _first(registering, stopped, broken)
        if registering.done():
            background.start(reporter.run(), "reports")
            await server.serving()
            log.info("%s serves at %s", registration.id, server.address)
            await _first(stopped, broken)
        registering.cancel()
        await server.not_serving()
        if not broken.done():
            await _drain(worker, queue, config.drain_seconds)
    finally:
        stopped.cancel()
        await background.stop()
        await _leave(queue)
        await worker.stop()
        await server.stop(0)
    await broken


async def _first(*tasks: asyncio.Task[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _drain(worker: Member, queue: RedisWorkerQueue, seconds: float) -> None:
    log.info("draining for up to %g s", seconds)
    worker.draining = True
    try:
        await queue.drain()
    except QueueError as error:
        log.warning("the registry was not told of the drain: %s", error)
    try:
        async with asyncio.timeout(seconds):
            while not worker.idle:  # noqa: ASYNC110 # a departure is in no hurry
                await asyncio.sleep(_DRAIN_POLL_SECONDS)
    except TimeoutError:
        log.warning("still busy after %g s: what runs is cut", seconds)


async def _leave(queue: RedisWorkerQueue) -> None:
    try:
        await queue.deregister()
    except QueueError as error:
        log.warning("left without telling the registry: %s", error)
    await queue.close()
