"""A cluster on this host: Redis, a gateway and workers, each a process of its own.

The only place that knows which processes make a cluster, where they listen and in which order they
stop: the gateway first, while the workers still finish its requests, then the workers, Redis last.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections import Counter
from types import TracebackType

from baton import rpc
from baton.config import (
    DecodeConfig,
    GatewayConfig,
    PrefillConfig,
    ProcessConfig,
    ServeConfig,
    environment_names,
    host_of,
    redis_url_from_environment,
)
from baton.errors import BatonError
from baton.v1 import model_pb2, model_pb2_grpc
from launcher import cores
from launcher.health import RETRY_SECONDS, until_serving
from launcher.options import flag
from launcher.supervisor import Command, LogSink, Supervisor
from queueing.embedded import EmbeddedRedis

GATEWAY = "gateway"
SECRETS = {"redis_url"}  # passed in the environment: everybody can read a command line
STOP_MARGIN = 5.0  # seconds for a process to stop, beyond the time that requests get to finish

_KINDS: dict[str, type[ProcessConfig]] = {
    "gateway": GatewayConfig,
    "prefill": PrefillConfig,
    "decode": DecodeConfig,
}


class StartTimeout(BatonError):
    """The cluster was not ready in time; names the processes that were not."""


class LocalCluster:
    """`async with LocalCluster(config, log) as cluster` is a cluster that answers; leaving it
    stops every process. Raises ChildFailed, StartTimeout or ConfigError on entering."""

    def __init__(self, config: ServeConfig, log: LogSink) -> None:
        self._config = config
        self._supervisor = Supervisor(log)
        self._redis: EmbeddedRedis | None = None
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


def addresses_of(config: ServeConfig) -> dict[str, str]:
    """Where each process listens; port 0 becomes a free one. The gateway comes first."""
    workers = [f"prefill-{i}" for i in range(config.prefill_workers)]
    workers += [f"decode-{i}" for i in range(config.decode_workers)]
    host, port = host_of(config.address), int(config.address.rpartition(":")[2])
    ports = free_ports(len(workers) + 1)
    addresses = {GATEWAY: f"{host}:{port or ports.pop()}"}
    return addresses | {name: f"127.0.0.1:{ports.pop()}" for name in workers}


def free_ports(count: int) -> list[int]:
    """Distinct ports that nobody listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def commands(config: ServeConfig, addresses: dict[str, str], redis_url: str) -> list[Command]:
    """The command of each process: what `config` says, on the addresses given."""
    workers = config.prefill_workers + config.decode_workers
    threads = config.threads or cores.share(cores.available(), workers)
    shared = config.model_dump() | {"redis_url": redis_url, "threads": threads}
    made = []
    for number, (name, address) in enumerate(addresses.items()):
        subcommand = name.partition("-")[0]
        kind = _KINDS[subcommand]
        settings = {key: shared[key] for key in kind.model_fields if key in shared}
        settings |= {
            "address": address,
            "metrics_address": _next_port(config.metrics_address, number),
        }
        if subcommand == GATEWAY:
            settings["gateway_id"] = f"{name}-{os.getpid()}"
        else:
            settings |= {"worker_id": f"{name}-{os.getpid()}", "advertise_address": address}
        if subcommand == "prefill":
            settings["kv_address"] = "127.0.0.1:0"
        made.append(_command(name, subcommand, kind, settings))
    return made


def _command(
    name: str, subcommand: str, kind: type[ProcessConfig], settings: dict[str, object]
) -> Command:
    argv = [sys.executable, "-m", "launcher", subcommand]
    env = {key: value for key, value in os.environ.items() if key != "BATON_CONFIG"}
    env.setdefault("GRPC_VERBOSITY", "ERROR")  # it tells of every connection that closes
    variables = environment_names(kind)
    for key, value in settings.items():
        if key in SECRETS:
            env[variables[key]] = str(value)
        elif isinstance(value, bool):
            argv.append(flag(key) if value else f"--no-{flag(key)[2:]}")
        elif value is not None:
            argv.append(f"{flag(key)}={value}")
    return Command(name, tuple(argv), env)


def _next_port(address: str, step: int) -> str:
    """`address` with its port moved on by `step`: one metrics address serves all processes."""
    if not address:
        return ""
    return f"{host_of(address)}:{int(address.rpartition(':')[2]) + step}"


async def until_complete(address: str, workers: dict[str, int]) -> str:
    """Wait until the gateway at `address` knows that many workers of each role; returns the name of
    the model it serves."""
    async with rpc.channel(address) as channel:
        admin = model_pb2_grpc.AdminServiceStub(channel)
        models = model_pb2_grpc.ModelServiceStub(channel)
        while True:
            answer = await admin.GetStatus(model_pb2.GetStatusRequest())
            roles = Counter(
                model_pb2.WorkerRole.Name(worker.role).removeprefix("WORKER_ROLE_").lower()
                for worker in answer.status.workers
            )
            if all(roles[role] >= count for role, count in workers.items()):
                listed = await models.ListModels(model_pb2.ListModelsRequest())
                return listed.models[0].name
            await asyncio.sleep(RETRY_SECONDS)
