"""The control plane over gRPC: the producer's KvService, and the consumer's way to it.

    consumer                              producer
       │ ── Connect(layout, host) ──────────▶ │   once per pair of engines, and per data connection
       │ ── Follow(lease, digests) ─────────▶ │
       │ ◀── blocks 0..3, digests ──────────  │   while prefill goes on
       │ ══ bytes by cuda_ipc, shm or tcp ══  │
       │ ── Renew(leases) ──────────────────▶ │   every ttl/6
       │ ◀── blocks 4..7, digests, sealed ──  │
       │ ── Release(lease, committed) ──────▶ │
       │ ◀── valid ─────────────────────────  │   only now is the copy worth anything

This is the hand-off's only translator between protobuf and Python.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import grpc
import grpc.aio

from baton.errors import KvTransferError
from baton.internal.v1 import kv_pb2, kv_pb2_grpc
from kv_transfer import local
from kv_transfer.device import TRANSPORT as DEVICE_TRANSPORT
from kv_transfer.device import DeviceReader, TargetPool
from kv_transfer.digest import DigestKind
from kv_transfer.producer import PROTOCOL_VERSION, FinalBlocks, LeaseProducer
from kv_transfer.shm import ShmReader
from kv_transfer.tcp import TcpReader
from kv_transfer.transport import DataEndpoint, PeerLost, Reader, Run

log = logging.getLogger(__name__)

TRANSPORTS = (DEVICE_TRANSPORT, "shm", "tcp")  # best first
_MAX_LEASES_PER_RENEWAL = 4096
_KINDS = {
    DigestKind.XXH3: kv_pb2.DIGEST_KIND_XXH3,
    DigestKind.DEVICE: kv_pb2.DIGEST_KIND_DEVICE,
}
_NAMED = {number: kind for kind, number in _KINDS.items()}
_NAMED[kv_pb2.DIGEST_KIND_UNSPECIFIED] = DigestKind.XXH3
_LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)

OpenChannel = Callable[[str], grpc.aio.Channel]


class KvServicer(kv_pb2_grpc.KvServiceServicer):
    """KvService over a LeaseProducer. Refusals are FAILED_PRECONDITION (another incarnation or
    layout) and NOT_FOUND (no such lease, or it has ended)."""

    def __init__(self, producer: LeaseProducer) -> None:
        self._producer = producer

    async def Connect(
        self,
        request: kv_pb2.ConnectRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> kv_pb2.ConnectResponse:
        """Compatibility check and data endpoints."""
        try:
            engine = self._producer.connect(request.version, request.layout_digest, request.host_id)
        except KvTransferError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return kv_pb2.ConnectResponse(
            engine_id=engine.engine_id,
            endpoints=[
                kv_pb2.Endpoint(transport=e.transport, address=e.address, token=e.token)
                for e in engine.endpoints
            ],
            block_bytes=engine.block_bytes,
            pool_blocks=engine.pool_blocks,
        )

    async def Follow(
        self,
        request: kv_pb2.FollowRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[kv_pb2.FollowResponse]:
        """Final blocks as they become so."""
        await self._check_engine(request.engine_id, context)
        try:
            kind = _kind(request.digest_kind)
            async for final in self._producer.follow(request.lease_id, kind):
                yield kv_pb2.FollowResponse(
                    first=final.first,
                    blocks=final.blocks,
                    digests=final.digests,
                    sealed=final.sealed,
                    digest_kind=_KINDS[kind],
                )
        except KvTransferError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))

    async def Renew(
        self,
        request: kv_pb2.RenewRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> kv_pb2.RenewResponse:
        """Extend leases."""
        await self._check_engine(request.engine_id, context)
        if len(request.lease_ids) > _MAX_LEASES_PER_RENEWAL:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too many leases at once")
        response = kv_pb2.RenewResponse()
        for lease_id in request.lease_ids:
            left = self._producer.renew(lease_id)
            response.time_to_live.add().FromTimedelta(timedelta(seconds=left))
        return response

    async def Release(
        self,
        request: kv_pb2.ReleaseRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> kv_pb2.ReleaseResponse:
        """The consumer is done."""
        await self._check_engine(request.engine_id, context)
        valid = self._producer.release(request.lease_id, committed=request.committed)
        return kv_pb2.ReleaseResponse(valid=valid)

    async def _check_engine(
        self, engine_id: str, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        if engine_id != self._producer.engine_id:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "another incarnation of this producer"
            )


def insecure(control_address: str) -> grpc.aio.Channel:
    """A channel without TLS: loopback and private networks. Shares no connection with other
    channels, so that a producer that restarted is not held to its predecessor's back-off."""
    return grpc.aio.insecure_channel(control_address, [("grpc.use_local_subchannel_pool", 1)])


class GrpcDialer:
    """Connects to producers by their KvService and picks the data transport: the first of
    `transports` that the producer offers and that works.

    `stall` is the longest time in seconds that a call or a data connection may make no progress.
    `device`: the consumer's pool, if it is on a device that others of the host can copy to; without
    it cuda_ipc is passed over.
    """

    def __init__(
        self,
        layout_digest: str,
        *,
        transports: Sequence[str] = TRANSPORTS,
        stall: float = 10.0,
        open_channel: OpenChannel = insecure,
        host_id: str | None = None,
        copy_threads: int = 4,
        device: TargetPool | None = None,
    ) -> None:
        unknown = set(transports) - set(TRANSPORTS)
        if unknown or not transports:
            raise ValueError(f"unknown KV transports: {sorted(unknown)}")
        self._layout_digest = layout_digest
        self._transports = tuple(transports)
        self._stall = stall
        self._open_channel = open_channel
        self._host_id = local.host_id() if host_id is None else host_id
        self._device = device
        self._threads = ThreadPoolExecutor(copy_threads, "kv-pull")

    async def dial(self, control_address: str) -> GrpcPeer:
        """Connect to whoever listens there. Raises KvTransferError."""
        channel = self._open_channel(control_address)
        try:
            stub = kv_pb2_grpc.KvServiceStub(channel)
            engine = await self._connect(stub)
            reader = await self._reader(stub, engine)
        except BaseException:
            await channel.close(None)
            raise
        log.info("producer %s: KV comes by %s", engine.engine_id, reader.transport)
        return GrpcPeer(channel, stub, engine, reader, self._stall)

    async def close(self) -> None:
        """End the threads, after the consumer has been closed."""
        await asyncio.to_thread(self._threads.shutdown)

    async def _connect(self, stub: kv_pb2_grpc.KvServiceAsyncStub) -> kv_pb2.ConnectResponse:
        request = kv_pb2.ConnectRequest(
            version=PROTOCOL_VERSION, layout_digest=self._layout_digest, host_id=self._host_id
        )
        try:
            return await stub.Connect(request, timeout=self._stall)
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from error

    async def _reader(
        self, stub: kv_pb2_grpc.KvServiceAsyncStub, engine: kv_pb2.ConnectResponse
    ) -> Reader:
        offered = {endpoint.transport: endpoint for endpoint in engine.endpoints}
        for name in self._transports:
            if name not in offered or (name == DEVICE_TRANSPORT and self._device is None):
                continue
            if name == "tcp":
                return TcpReader(
                    lambda: self._tcp_endpoint(stub, engine.engine_id),
                    block_bytes=engine.block_bytes,
                    stall=self._stall,
                    threads=self._threads,
                )
            try:
                return await self._local_reader(offered[name], engine)
            except KvTransferError as error:
                log.warning("producer %s: %s; trying the next transport", engine.engine_id, error)
        raise KvTransferError(
            f"no common KV transport: {', '.join(self._transports)} wanted, "
            f"{', '.join(offered) or 'none'} offered"
        )

    async def _local_reader(
        self, endpoint: kv_pb2.Endpoint, engine: kv_pb2.ConnectResponse
    ) -> Reader:
        """By way of the host's memory, or a device's. Raises KvTransferError."""
        if endpoint.transport == DEVICE_TRANSPORT and self._device is not None:
            return await DeviceReader.open(
                endpoint.address,
                endpoint.token,
                blocks=engine.pool_blocks,
                device=self._device,
                threads=self._threads,
            )
        return await ShmReader.open(
            endpoint.address,
            endpoint.token,
            blocks=engine.pool_blocks,
            block_bytes=engine.block_bytes,
            threads=self._threads,
        )

    async def _tcp_endpoint(
        self, stub: kv_pb2_grpc.KvServiceAsyncStub, engine_id: str
    ) -> DataEndpoint:
        """Address and a fresh token for one more data connection."""
        engine = await self._connect(stub)
        if engine.engine_id != engine_id:
            raise PeerLost("the producer restarted")
        for endpoint in engine.endpoints:
            if endpoint.transport == "tcp":
                return DataEndpoint("tcp", endpoint.address, endpoint.token)
        raise PeerLost("the producer offers tcp no more")


class GrpcPeer:
    """A connected producer; see links.Peer."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        stub: kv_pb2_grpc.KvServiceAsyncStub,
        engine: kv_pb2.ConnectResponse,
        reader: Reader,
        stall: float,
    ) -> None:
        self.engine_id = engine.engine_id
        self.pool_blocks = engine.pool_blocks
        self.transport = reader.transport
        self._channel = channel
        self._stub = stub
        self._reader = reader
        self._stall = stall

    async def follow(self, lease_id: bytes) -> AsyncGenerator[FinalBlocks, None]:
        """News of a lease until its seal."""
        kind = self._reader.digest_kind
        request = kv_pb2.FollowRequest(
            lease_id=lease_id, engine_id=self.engine_id, digest_kind=_KINDS[kind]
        )
        call = self._stub.Follow(request)
        try:
            async for message in call:
                if len(message.blocks) != len(message.digests):
                    raise PeerLost("the producer sent blocks without digests")
                if _kind(message.digest_kind) is not kind:
                    raise PeerLost("the producer sent digests of another kind")
                yield FinalBlocks(
                    message.first, tuple(message.blocks), tuple(message.digests), message.sealed
                )
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from error
        finally:
            call.cancel()

    async def renew(self, lease_ids: Sequence[bytes]) -> list[float]:
        """Times to live in seconds, 0 for leases that are gone."""
        request = kv_pb2.RenewRequest(engine_id=self.engine_id, lease_ids=lease_ids)
        try:
            response = await self._stub.Renew(request, timeout=self._stall)
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from error
        if len(response.time_to_live) != len(lease_ids):
            raise PeerLost("the producer renewed other leases than asked")
        return [left.ToTimedelta().total_seconds() for left in response.time_to_live]

    async def release(self, lease_id: bytes, *, committed: bool) -> bool:
        """Whether the copy is valid."""
        request = kv_pb2.ReleaseRequest(
            lease_id=lease_id, engine_id=self.engine_id, committed=committed
        )
        try:
            response = await self._stub.Release(request, timeout=self._stall)
        except grpc.aio.AioRpcError as error:
            raise _translated(error) from error
        return response.valid

    async def read(self, run: Run) -> None:
        """Fill and land every target."""
        await self._reader.read(run)

    async def close(self) -> None:
        """Let go of the data channel and the control channel."""
        await self._reader.close()
        await self._channel.close(None)


def _translated(error: grpc.aio.AioRpcError) -> KvTransferError:
    kind = PeerLost if error.code() in _LOST else KvTransferError
    return kind(f"producer: {error.details() or error.code().name}")


def _kind(told: kv_pb2.DigestKind.ValueType) -> DigestKind:
    """Raises KvTransferError for a kind that is not known here."""
    try:
        return _NAMED[told]
    except KeyError:
        raise KvTransferError(f"digests of kind {told} are not known here") from None
