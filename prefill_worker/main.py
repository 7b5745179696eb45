"""One prefill worker process, from its configuration to its departure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from prometheus_client import REGISTRY, CollectorRegistry

from baton import telemetry
from baton.addresses import require_loopback, require_reachable
from baton.config import PrefillConfig
from baton.internal.v1 import kv_pb2_grpc, worker_pb2_grpc
from baton.prefix import block_keys
from baton.rpc import Server
from baton.shared_cores import Place, SharedCores
from engine.host_blocks import on_device, to_publish
from engine.load import executor_from, reuses_prefixes
from engine.metrics import EngineMetrics
from engine.recording import RecordedPrefillScheduler, RunRecorder, recorder_from
from kv_transfer.channel import KvServicer
from kv_transfer.contract import KvLayout
from kv_transfer.producer import LeaseProducer
from kv_transfer.shm import SharedPool
from prefill_worker.service import PrefillService
from prefill_worker.worker import PrefillWorker
from queueing import membership
from queueing.contract import Role
from queueing.membership import Membership
from scheduling.cost import CostTracker
from scheduling.order import policy_from
from scheduling.plan import Capacity
from scheduling.prefill import PrefillScheduler

SERVICES = ("baton.internal.v1.PrefillService", "baton.internal.v1.KvService")
CLAIMED_PASSES = 4  # prompt tokens claimed ahead, in passes: the queue keeps the rest in order


class PrefillServer:
    """A prefill worker behind its gRPC API. `start`, then `stop`."""

    def __init__(self, config: PrefillConfig, registry: CollectorRegistry = REGISTRY) -> None:
        """Load and warm up the model, bind the address; port 0 takes a free one.

        Raises ConfigError and ModelError.
        """
        _check(config)
        server = Server(config.address)
        address = require_reachable(
            config.advertise_address or server.address, "--advertise-address"
        )
        executor = executor_from(config, share=self._share)
        if config.shared_cores:
            executor.share_cores(SharedCores(Place.parse(config.shared_cores)))
        capacity, layout = executor.capacity, KvLayout(**asdict(executor.pool.geometry))
        reuse = reuses_prefixes(config, capacity)
        config = config.model_copy(update={"prefix_cache": reuse})
        runs, store = to_publish(executor, lambda size: self._share(size).buffer)
        self._producer = LeaseProducer(
            store,
            layout,
            control_address=address,
            on_freed=lambda lease_id: self.worker.on_freed(lease_id),
            shared=self._pool,
            device=on_device(store),
            data_address=config.kv_address,
            time_to_live=config.kv_lease_seconds,
        )
        cost = CostTracker()
        self._executor = executor
        self._recorder = recorder_from(config, "prefill", capacity, cost.model)
        scheduler = _scheduler(config, capacity, cost, self._recorder)
        metrics = EngineMetrics("prefill", registry)
        self.worker = PrefillWorker(runs, scheduler, self._producer, metrics, on_idle=executor.rest)
        service, kv_service = PrefillService(self.worker), KvServicer(self._producer)
        worker_pb2_grpc.add_PrefillServiceServicer_to_server(service, server.grpc)
        kv_pb2_grpc.add_KvServiceServicer_to_server(kv_service, server.grpc)
        registration = membership.registration(
            config,
            Role.PREFILL,
            address,
            executor.fingerprint,
            layout,
            capacity,
            weight_dtype=executor.weight_dtype,
            capacity_tokens=min(
                CLAIMED_PASSES * capacity.max_tokens, capacity.blocks * capacity.block_size
            ),
            max_context=capacity.max_context,
        )
        self._membership = Membership(self.worker, server, SERVICES, registration, config)

    def _share(self, size: int) -> SharedPool:
        """Memory for the KV pool that decode workers on this host can map."""
        self._pool = SharedPool(size)
        return self._pool

    async def start(self) -> None:
        """Join the cluster."""
        await self._producer.start()
        self.worker.engine.start()
        await self._membership.join()

    async def broken(self) -> None:
        """Raise what broke the engine, if something does."""
        await self.worker.engine.wait_closed()

    async def stop(self, drain_seconds: float) -> None:
        """Leave the cluster."""
        await self._membership.leave(drain_seconds)
        await self.worker.stop()
        await self._producer.close()
        self._pool.close()
        self._executor.close()
        if self._recorder is not None:
            self._recorder.close()


def _check(config: PrefillConfig) -> None:
    """Raise ConfigError if a prefill worker cannot run so."""
    for address in (config.address, config.kv_address):
        require_loopback(address, insecure_network=config.insecure_network)
    require_reachable(config.kv_address, "--kv-address")


def _scheduler(
    config: PrefillConfig, capacity: Capacity, cost: CostTracker, recorder: RunRecorder | None
) -> PrefillScheduler:
    make: Callable[..., PrefillScheduler] = PrefillScheduler
    if recorder is not None:
        make = partial(RecordedPrefillScheduler, recorder=recorder)
    return make(
        capacity,
        policy_from(config, cost),
        max_waiting=config.max_waiting,
        cost=cost,
        block_keys=block_keys if config.prefix_cache else None,
    )


async def run(config: PrefillConfig) -> None:
    """Serve until SIGINT or SIGTERM, then drain. Raises ConfigError and ModelError at start."""
    telemetry.start("prefill", config)
    metrics = telemetry.MetricsServer(config.metrics_address)
    try:
        await membership.run(PrefillServer(config), config.drain_seconds)
    finally:
        metrics.stop()
