"""The AdminService RPCs: the state of the cluster, as this gateway sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import grpc.aio

from baton import wire
from baton.errors import InvalidRequest, Unsupported
from baton.v1 import model_pb2, model_pb2_grpc
from baton.v1.model_pb2 import (
    ClusterStatus,
    DrainWorkerRequest,
    DrainWorkerResponse,
    GetStatusRequest,
    GetStatusResponse,
    LengthPrediction,
    QueueLevel,
    WatchStatusRequest,
    WatchStatusResponse,
    WorkerStatus,
)
from gateway.core import Gateway
from queueing.contract import Role, WorkerRecord

Context = grpc.aio.ServicerContext[Any, Any]

DEFAULT_INTERVAL = 1.0
MIN_INTERVAL = 0.1
MAX_INTERVAL = 3600.0

_ROLES = {
    Role.PREFILL: model_pb2.WORKER_ROLE_PREFILL,
    Role.DECODE: model_pb2.WORKER_ROLE_DECODE,
}


class AdminService(model_pb2_grpc.AdminServiceServicer):
    """The queue is the pool's; workers, running requests and their rate are as this gateway sees
    them."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def GetStatus(self, request: GetStatusRequest, context: Context) -> GetStatusResponse:
        """One snapshot."""
        return GetStatusResponse(status=await self._status())

    async def WatchStatus(
        self, request: WatchStatusRequest, context: Context
    ) -> AsyncIterator[WatchStatusResponse]:
        """Snapshots until the client goes away."""
        interval = DEFAULT_INTERVAL
        if request.HasField("interval"):
            interval = wire.seconds(request.interval)
            if not MIN_INTERVAL <= interval <= MAX_INTERVAL:
                raise InvalidRequest.of(
                    "interval", f"must be from {MIN_INTERVAL:g} to {MAX_INTERVAL:g} s"
                )
        while True:
            yield WatchStatusResponse(status=await self._status())
            await asyncio.sleep(interval)

    async def DrainWorker(
        self, request: DrainWorkerRequest, context: Context
    ) -> DrainWorkerResponse:
        """Not yet."""
        raise Unsupported(
            "DrainWorker is not supported by this server yet: send SIGTERM to the worker, which "
            "then takes no new work and finishes what it holds"
        )

    async def _status(self) -> ClusterStatus:
        levels = await self._gateway.queue.depth()
        workers = self._gateway.fleet.records  # those it gives work to, as of its last look
        return ClusterStatus(
            levels=[
                QueueLevel(
                    level=level.level,
                    waiting_requests=level.requests,
                    waiting_tokens=level.tokens,
                    oldest=wire.duration(level.oldest),
                )
                for level in levels
            ],
            workers=map(
                _worker, sorted(workers, key=lambda worker: (worker.role.value, worker.id))
            ),
            running_requests=len(self._gateway.sessions) - self._gateway.sessions.waiting,
            output_tokens_per_second=self._gateway.output_rate(),
            length_prediction=self._length_prediction(),
        )

    def _length_prediction(self) -> LengthPrediction | None:
        lengths = self._gateway.lengths
        report = lengths.report() if lengths is not None else None
        if report is None:
            return None
        figures = asdict(report)
        del figures["weight"]
        return LengthPrediction(**figures)


def _worker(record: WorkerRecord) -> WorkerStatus:
    status = WorkerStatus(
        id=record.id,
        role=_ROLES[record.role],
        total_kv_blocks=record.capacity_blocks,
        free_kv_blocks=record.capacity_blocks,
        draining=record.draining,
    )
    if record.load is not None:
        status.running_sequences = record.load.running
        status.waiting_sequences = record.load.waiting
        status.free_kv_blocks = record.load.free_blocks
        status.total_kv_blocks = record.load.total_blocks
        status.host_kv_blocks = record.load.host_blocks
        status.draining = record.draining or record.load.draining
        status.steps_per_second = record.load.steps_per_second
    return status
