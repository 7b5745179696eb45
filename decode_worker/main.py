"""One decode worker process, from its configuration to its departure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from prometheus_client import REGISTRY, CollectorRegistry

from baton import rpc, telemetry
from baton.addresses import require_loopback, require_reachable
from baton.config import DecodeConfig
from baton.errors import ConfigError
from baton.internal.v1 import worker_pb2_grpc
from baton.prefix import block_keys
from baton.shared_cores import Place, SharedCores
from decode_worker.metrics import DecodeMetrics
from decode_worker.service import DecodeService
from decode_worker.worker import DecodeWorker
from engine.host_blocks import filling, on_device, to_fill
from engine.load import executor_from, reuses_prefixes
from engine.recording import RecordedDecodeScheduler, RunRecorder, recorder_from
from kv_transfer.channel import GrpcDialer
from kv_transfer.consumer import PullConsumer
from kv_transfer.contract import KvLayout
from kv_transfer.device import TargetPool
from queueing import membership
from queueing.contract import Role
from queueing.membership import Membership
from scheduling.cost import CostTracker
from scheduling.decode import DecodeScheduler
from scheduling.order import policy_from
from scheduling.plan import Capacity
from scheduling.rules import Rules

SERVICES = ("baton.internal.v1.DecodeService",)


class DecodeServer:
    """A decode worker behind its gRPC API. `start`, then `stop`."""

    def __init__(self, config: DecodeConfig, registry: CollectorRegistry = REGISTRY) -> None:
        """Load and warm up the model, bind the address; port 0 takes a free one.

        Raises ConfigError and ModelError.
        """
        require_loopback(config.address, insecure_network=config.insecure_network)
        server = rpc.Server(config.address)
        address = require_reachable(
            config.advertise_address or server.address, "--advertise-address"
        )
        executor = executor_from(config)
        if config.shared_cores:
            executor.share_cores(SharedCores(Place.parse(config.shared_cores)))
        capacity, layout = executor.capacity, KvLayout(**asdict(executor.pool.geometry))
        reuse = reuses_prefixes(config, capacity)
        config = config.model_copy(update={"prefix_cache": reuse})
        cost = CostTracker()
        store = to_fill(executor)
        self._dialer = _dialer(config, layout, on_device(store))
        self._consumer = PullConsumer(store, layout, self._dialer, timeout=config.kv_timeout)
        self._executor = executor
        self._recorder = recorder_from(config, "decode", capacity, cost.model)
        self.worker = DecodeWorker(
            executor,
            _scheduler(config, capacity, cost, self._recorder),
            filling(self._consumer, store),
            DecodeMetrics(executor.pool.block_bytes, registry),
            reserve_timeout=config.reserve_timeout,
            on_idle=executor.rest,
        )
        service = DecodeService(self.worker)
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(service, server.grpc)
        registration = membership.registration(
            config,
            Role.DECODE,
            address,
            executor.fingerprint,
            layout,
            capacity,
            weight_dtype=executor.weight_dtype,
            capacity_tokens=capacity.blocks * capacity.block_size,
            max_context=capacity.longest_sequence,
            batch_sequences=capacity.max_sequences,
        )
        self._membership = Membership(self.worker, server, SERVICES, registration, config)

    async def start(self) -> None:
        """Join the cluster."""
        self.worker.engine.start()
        await self._membership.join()

    async def broken(self) -> None:
        """Raise what broke the engine, if something does."""
        await self.worker.engine.wait_closed()

    async def stop(self, drain_seconds: float) -> None:
        """Leave the cluster."""
        await self._membership.leave(drain_seconds)
        await self.worker.stop()
        await self._consumer.close()
        await self._dialer.close()
        self._executor.close()
        if self._recorder is not None:
            self._recorder.close()


async def run(config: DecodeConfig) -> None:
    """Serve until SIGINT or SIGTERM, then drain. Raises ConfigError and ModelError at start."""
    telemetry.start("decode", config)
    metrics = telemetry.MetricsServer(config.metrics_address)
    try:
        await membership.run(DecodeServer(config), config.drain_seconds)
    finally:
        metrics.stop()


def _scheduler(
    config: DecodeConfig, capacity: Capacity, cost: CostTracker, recorder: RunRecorder | None
) -> DecodeScheduler:
    make: Callable[..., DecodeScheduler] = DecodeScheduler
    if recorder is not None:
        make = partial(RecordedDecodeScheduler, recorder=recorder)
    return make(
        capacity,
        policy_from(config, cost),
        max_waiting=config.max_waiting,
        rules=Rules.of(config),
        cost=cost,
        block_keys=block_keys if config.prefix_cache else None,
    )


def _dialer(config: DecodeConfig, layout: KvLayout, device: TargetPool | None) -> GrpcDialer:
    transports = [name.strip() for name in config.kv_transports.split(",") if name.strip()]
    try:
        return GrpcDialer(
            layout.digest,
            transports=transports,
            stall=config.kv_timeout,
            open_channel=rpc.channel,
            device=device,
        )
    except ValueError as error:
        raise ConfigError(f"--kv-transports {config.kv_transports}: {error}") from error
