"""A producer and a consumer over each transport, with pools of recognisable bytes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc.aio
import numpy as np
import pytest

from baton.internal.v1.kv_pb2_grpc import KvServiceStub, add_KvServiceServicer_to_server
from baton.types import KvRef
from kv_transfer.channel import GrpcDialer, KvServicer
from kv_transfer.consumer import PullConsumer
from kv_transfer.contract import KvLayout
from kv_transfer.memory import Network
from kv_transfer.producer import LeaseProducer
from kv_transfer.shm import allocate
from kv_transfer.store import BufferStore
from tests.kv_transfer.devices import kernels_in_turn, make_device, need_interpreter

LAYOUT = KvLayout(
    model_fingerprint="test",
    layers=4,
    kv_heads=2,
    head_dim=64,
    dtype="float32",
    block_size=16,
    item_size=4,
)
BLOCKS = 64
POISON = 0xA5


class Clock:
    """Real time that a test can push forward."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


class Pair:
    """A producer and a consumer in this process, connected by one transport."""

    def __init__(self, transport: str, clock: Clock) -> None:
        self.transport = transport
        self.clock = clock
        self.network = Network()
        self.freed: list[bytes] = []
        self.shared = allocate(BLOCKS * LAYOUT.block_bytes)
        self.source = BufferStore(self.shared.buffer, LAYOUT.block_bytes)
        self.target = BufferStore(bytearray(BLOCKS * LAYOUT.block_bytes), LAYOUT.block_bytes)
        numbers = np.random.default_rng(7)
        self.source_bytes = np.frombuffer(self.shared.buffer, np.uint8)
        self.source_bytes[:] = numbers.integers(0, 256, self.source_bytes.size, np.uint8)
        self.staged: list[int] = []  # blocks that a producer on a device brought to host memory
        self.poison()
        self.producer: LeaseProducer
        self.consumer: PullConsumer
        self.cleanup = contextlib.AsyncExitStack()
        self._server: grpc.aio.Server | None = None

    async def start(self, producer: dict[str, Any], consumer: dict[str, Any]) -> None:
        """Bring both ends up."""
        await self.start_producer("127.0.0.1:0", **producer)
        if self.transport == "memory":
            self.dialer: Any = self.network.dialer(LAYOUT.digest)
        else:
            stall = consumer.get("timeout", 20.0)
            device = make_device(self.target, self.staged.extend)
            self.dialer = GrpcDialer(
                LAYOUT.digest, transports=[self.transport], stall=stall, device=device
            )
            self.cleanup.push_async_callback(self.dialer.close)
        if self.transport == "cuda_ipc":  # the device's blocks are not those of the BlockStore
            consumer = {"slice_bytes": 4 * LAYOUT.block_bytes} | consumer
            self.host = BufferStore(bytearray(BLOCKS * LAYOUT.block_bytes), LAYOUT.block_bytes)
        else:
            self.host = self.target
        self.consumer = PullConsumer(self.host, LAYOUT, self.dialer, **consumer)
        self.cleanup.push_async_callback(self.consumer.close)

    async def start_producer(self, address: str, **options: Any) -> None:
        """A fresh producer incarnation over the same pool, at `address`."""
        if self.transport != "memory":
            self._server = grpc.aio.server()
            address = f"127.0.0.1:{self._server.add_insecure_port(address)}"
            options |= {"shared": self.shared, "data_address": "127.0.0.1:0"}
        store = self.source
        if self.transport == "cuda_ipc":
            store, options = self._on_device(options)
        self.producer = LeaseProducer(
            store,
            LAYOUT,
            control_address=address,
            on_freed=self.freed.append,
            clock=self.clock,
            **options,
        )
        self.network.attach(self.producer, self.source)
        await self.producer.start()
        self.cleanup.push_async_callback(self.producer.close)
        if self._server is not None:
            add_KvServiceServicer_to_server(KvServicer(self.producer), self._server)
            await self._server.start()
            self.cleanup.push_async_callback(self._server.stop, None)

    def _on_device(self, options: dict[str, Any]) -> tuple[BufferStore, dict[str, Any]]:
        """The source is a device's memory; its twin in host memory is empty, and `saved` into."""
        twin = allocate(self.shared.size)
        store = BufferStore(twin.buffer, LAYOUT.block_bytes)

        def save(blocks: Sequence[int]) -> None:
            self.staged.extend(blocks)
            for block in blocks:
                store.block(block)[:] = self.source.block(block)

        device = make_device(self.source, save)
        device.export()
        return store, options | {"shared": twin, "device": device}

    async def stop_producer(self) -> None:
        """End the present incarnation."""
        if self._server is not None:
            await self._server.stop(None)
        await self.producer.close()
        self.network.detach(self.producer.control_address)

    def publish(self, blocks: Sequence[int], *, sealed: bool = True) -> KvRef:
        """A lease over source blocks, all final at once if `sealed`."""
        ref = self.producer.publish(blocks, len(blocks) * LAYOUT.block_size)
        if sealed:
            self.producer.seal(ref.lease_id)
        return ref

    def digested(self, ref: KvRef) -> bool:
        """Whether the digests of every block have been taken."""
        lease = self.producer._table.find(ref.lease_id)
        return lease is not None and len(lease.digests) == ref.blocks

    def poison(self) -> None:
        """Overwrite the consumer's whole pool."""
        for index in range(BLOCKS):
            self.target.block(index)[:] = bytes([POISON]) * LAYOUT.block_bytes

    def poisoned(self, index: int) -> bool:
        """Whether nothing has written into a block of the consumer."""
        return bytes(self.target.block(index)) == bytes([POISON]) * LAYOUT.block_bytes

    def copied(self, blocks: Sequence[int], into: Sequence[int]) -> bool:
        """Whether the consumer has exactly these blocks there."""
        pairs = zip(blocks, into, strict=True)
        return all(self.source.block(a) == self.target.block(b) for a, b in pairs)

    def flip_bit(self, block: int) -> None:
        """Damage a source block."""
        self.source.block(block)[LAYOUT.block_bytes // 2] ^= 1


@pytest.fixture
def clock() -> Clock:
    """The producer's clock."""
    return Clock()


@pytest.fixture(autouse=True)
def one_kernel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends are in this process."""
    kernels_in_turn(monkeypatch)


@pytest.fixture(params=["memory", "shm", "tcp", "cuda_ipc"])
def transport(request: pytest.FixtureRequest) -> str:
    """Every transport in turn."""
    if request.param == "cuda_ipc":
        need_interpreter()
    return str(request.param)


@pytest.fixture
async def make_pair(transport: str, clock: Clock) -> AsyncIterator[Callable[..., Any]]:
    """Build a Pair with options for either end."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(
            producer: dict[str, Any] | None = None, consumer: dict[str, Any] | None = None
        ) -> Pair:
            pair = Pair(transport, clock)
            stack.push_async_callback(pair.cleanup.aclose)
            await pair.start(producer or {}, consumer or {})
            return pair

        yield make


@pytest.fixture
async def pair(make_pair: Callable[..., Any]) -> Pair:
    """A Pair with default options."""
    return await make_pair()


@pytest.fixture
async def stub(pair: Pair) -> AsyncIterator[KvServiceStub]:
    """The producer's control channel, bare."""
    async with grpc.aio.insecure_channel(pair.producer.control_address) as channel:
        yield KvServiceStub(channel)


async def _until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        for _ in iter(lambda: bool(condition()), True):
            await asyncio.sleep(0.005)


@pytest.fixture
def until() -> Callable[..., Any]:
    """Wait until a condition holds, or fail."""
    return _until


@pytest.fixture
def layout() -> KvLayout:
    """The layout that both ends have."""
    return LAYOUT
