"""One prefill worker process, from its configuration to its departure."""

from __future__ import annotations

from dataclasses import asdict

from baton import telemetry
from baton.config import PrefillConfig, require_loopback
from baton.internal.v1 import kv_pb2_grpc, worker_pb2_grpc
from baton.process import unique_id
from baton.rpc import Server
from engine.metrics import EngineMetrics
from engine.model.load import executor_from
from kv_transfer.channel import KvServicer
from kv_transfer.contract import KvLayout
from kv_transfer.producer import LeaseProducer
from kv_transfer.shm import SharedPool
from prefill_worker.service import PrefillService
from prefill_worker.worker import PrefillWorker
from queueing import membership
from queueing.contract import Registration, Role
from scheduling.order import policy_from
from scheduling.prefill import PrefillScheduler

SERVICES = ("baton.internal.v1.PrefillService", "baton.internal.v1.KvService")
CLAIMED_PASSES = 4  # prompt tokens claimed ahead, in passes: the queue keeps the rest in order


async def run(config: PrefillConfig) -> None:
    """Load the model, join the cluster, serve until told to stop.

    Raises ModelError and ConfigError before anything is served.
    """
    telemetry.start("prefill", config)
    require_loopback(config.address, insecure_network=config.insecure_network)
    metrics = telemetry.MetricsServer(config.metrics_address)
    server = Server(config.address)
    address = config.advertise_address or server.address

    pools: list[SharedPool] = []

    def shared_memory(size: int) -> memoryview:
        pools.append(SharedPool(size))
        return pools[0].buffer

    # The KV pool of a CPU worker lies in memory that decode workers on this host can map.
    executor = executor_from(config, buffer=shared_memory if config.device == "cpu" else None)
    executor.warm_up()
    capacity, layout = executor.capacity, KvLayout(**asdict(executor.pool.geometry))
    producer = LeaseProducer(
        executor.pool,
        layout,
        control_address=address,
        on_freed=lambda lease_id: worker.on_freed(lease_id),
        shared=pools[0] if pools else None,
        data_address=config.kv_address,
        time_to_live=config.kv_lease_seconds,
    )
    scheduler = PrefillScheduler(capacity, policy_from(config), max_waiting=config.max_waiting)
    worker = PrefillWorker(executor, scheduler, producer, EngineMetrics("prefill"))
    worker_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillService(worker), server.grpc)
    kv_pb2_grpc.add_KvServiceServicer_to_server(KvServicer(producer), server.grpc)
    ahead = min(CLAIMED_PASSES * capacity.max_tokens, capacity.blocks * capacity.block_size)
    registration = Registration(
        id=config.worker_id or unique_id("prefill"),
        role=Role.PREFILL,
        address=address,
        layout_digest=layout.digest,
        model=executor.fingerprint,
        capacity_tokens=ahead,
        capacity_blocks=capacity.blocks,
        max_context=capacity.max_context,
    )
    await producer.start()
    worker.engine.start()
    try:
        await membership.serve(worker, server, SERVICES, registration, config)
    finally:
        await producer.close()
        for pool in pools:
            pool.close()
        metrics.stop()
