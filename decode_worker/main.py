"""One decode worker process, from its configuration to its departure."""

from __future__ import annotations

from dataclasses import asdict

from baton import rpc, telemetry
from baton.config import DecodeConfig, require_loopback
from baton.errors import ConfigError
from baton.internal.v1 import worker_pb2_grpc
from baton.process import unique_id
from decode_worker.service import DecodeService
from decode_worker.worker import DecodeWorker
from engine.metrics import EngineMetrics
from engine.model.load import executor_from
from kv_transfer.channel import GrpcDialer
from kv_transfer.consumer import PullConsumer
from kv_transfer.contract import KvLayout
from queueing import membership
from queueing.contract import Registration, Role
from scheduling.decode import DecodeScheduler
from scheduling.order import policy_from

SERVICES = ("baton.internal.v1.DecodeService",)


async def run(config: DecodeConfig) -> None:
    """Load the model, join the cluster, serve until told to stop.

    Raises ModelError and ConfigError before anything is served.
    """
    telemetry.start("decode", config)
    require_loopback(config.address, insecure_network=config.insecure_network)
    metrics = telemetry.MetricsServer(config.metrics_address)
    server = rpc.Server(config.address)
    executor = executor_from(config)
    executor.warm_up()
    capacity, layout = executor.capacity, KvLayout(**asdict(executor.pool.geometry))
    dialer = _dialer(config, layout)
    consumer = PullConsumer(executor.pool, layout, dialer, timeout=config.kv_timeout)
    worker = DecodeWorker(
        executor,
        DecodeScheduler(capacity, policy_from(config), max_waiting=config.max_waiting),
        consumer,
        EngineMetrics("decode"),
        reserve_timeout=config.reserve_timeout,
    )
    worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeService(worker), server.grpc)
    registration = Registration(
        id=config.worker_id or unique_id("decode"),
        role=Role.DECODE,
        address=config.advertise_address or server.address,
        layout_digest=layout.digest,
        model=executor.fingerprint,
        capacity_tokens=capacity.blocks * capacity.block_size,
        capacity_blocks=capacity.blocks,
        max_context=capacity.max_context,
    )
    worker.engine.start()
    try:
        await membership.serve(worker, server, SERVICES, registration, config)
    finally:
        await consumer.close()
        await dialer.close()
        metrics.stop()


def _dialer(config: DecodeConfig, layout: KvLayout) -> GrpcDialer:
    transports = [name.strip() for name in config.kv_transports.split(",") if name.strip()]
    try:
        return GrpcDialer(
            layout.digest,
            transports=transports,
            stall=config.kv_timeout,
            open_channel=rpc.channel,
        )
    except ValueError as error:
        raise ConfigError(f"--kv-transports {config.kv_transports}: {error}") from error
