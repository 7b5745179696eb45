"""A cluster on this host: Redis, a gateway and workers, each a process of its own.

They stop in order: the gateway first, while the workers still finish its requests, then the
workers, Redis last.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from types import TracebackType

import grpc.aio

from baton import rpc
from baton.config import ServeConfig, redis_url_from_environment
from baton.errors import BatonError
from baton.process import Background
from baton.v1 import model_pb2, model_pb2_grpc
from launcher.health import RETRY_SECONDS, until_serving
from launcher.plan import GATEWAY, addresses_of, commands
from launcher.supervisor import LogSink, Supervisor
from queueing.embedded import EmbeddedRedis

STOP_MARGIN = 5.0  # seconds for a process to stop, beyond the time that requests get to finish


class StartTimeout(BatonError):
    """The cluster was not ready in time; names the processes that were not."""


class LocalCluster:
    """`async with LocalCluster(config, log) as cluster` is a cluster that answers; leaving it
    stops every process. Raises ChildFailed, StartTimeout or ConfigError on entering."""

    def __init__(self, config: ServeConfig, log: LogSink) -> None:
        self._config = config
        self._supervisor = Supervisor(log)
        self._redis: EmbeddedRedis | None = None
        self._background = Background()
        self._addresses: dict[str, str] = {}
        self._awaited: set[str] = set()
        self.model = ""  # its served name

    @property
    def address(self) -> str:
        """host:port of the public API."""
        return self._addresses[GATEWAY]

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name, Redis included if it is ours."""
        redis = {"redis": self._redis.pid} if self._redis else {}
        return redis | self._supervisor.pids

    def ready_line(self) -> str:
        """What `baton serve` prints once it is up."""
        return (
            f"ready address={self.address} model={self.model} "
            f"prefill={self._config.prefill_workers} decode={self._config.decode_workers}"
        )

    async def __aenter__(self) -> LocalCluster:
        try:
            await self._start()
        except BaseException:
            await self._stop(drain=0)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop(drain=self._config.drain_seconds)

    async def _start(self) -> None:
        url = self._config.redis_url.get_secret_value() or redis_url_from_environment()
        if not url:
            self._redis = await EmbeddedRedis.start()
            self._background.start(self._redis.keep_up(), "redis")
            url = self._redis.url
        self._addresses = addresses_of(self._config)
        await self._supervisor.start(commands(self._config, self._addresses, url))
        ready = asyncio.create_task(self._wait_ready())
        failed = asyncio.create_task(self._supervisor.failed())
        try:
            async with asyncio.timeout(self._config.start_timeout):
                await asyncio.wait([ready, failed], return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise StartTimeout(
                f"not ready after {self._config.start_timeout:g} s (--start-timeout): "
                f"still waiting for {', '.join(sorted(self._awaited))}"
            ) from None
        finally:
            ready.cancel()
            failed.cancel()
        if failed.done() and not failed.cancelled():
            raise failed.result()
        ready.result()
        self._supervisor.settle()

    async def _stop(self, drain: float) -> None:
        names = list(self._addresses)
        workers = [name for name in names if name != GATEWAY]
        gateway = [name for name in names if name == GATEWAY]
        try:
            await self._supervisor.stop([(gateway, drain + STOP_MARGIN), (workers, STOP_MARGIN)])
        finally:
            await self._background.stop()
            if self._redis:
                await self._redis.stop()

    async def _wait_ready(self) -> None:
        self._awaited = set(self._addresses)
        async with asyncio.TaskGroup() as group:
            for name in self._addresses:
                group.create_task(self._wait_serving(name))
        self._awaited = {"the gateway to find the workers"}
        workers = {"prefill": self._config.prefill_workers, "decode": self._config.decode_workers}
        self.model = await until_complete(self.address, workers)

    async def _wait_serving(self, name: str) -> None:
        await until_serving(self._addresses[name])
        self._awaited.discard(name)


async def until_complete(address: str, workers: dict[str, int]) -> str:
    """Wait until the gateway at `address` knows that many workers of each role; returns the name of
    the model it serves."""
    async with rpc.channel(address) as channel:
        while True:
            try:
                found = await _workers(channel)
                if all(found[role] >= count for role, count in workers.items()):
                    models = model_pb2_grpc.ModelServiceStub(channel)
                    listed = await models.ListModels(model_pb2.ListModelsRequest())
                    return listed.models[0].name
            except grpc.aio.AioRpcError:
                pass  # if it has ended, its supervisor says so
            await asyncio.sleep(RETRY_SECONDS)


async def _workers(channel: grpc.aio.Channel) -> Counter[str]:
    """How many workers of each role the gateway knows."""
    admin = model_pb2_grpc.AdminServiceStub(channel)
    answer = await admin.GetStatus(model_pb2.GetStatusRequest())
    return Counter(
        model_pb2.WorkerRole.Name(worker.role).removeprefix("WORKER_ROLE_").lower()
        for worker in answer.status.workers
    )
