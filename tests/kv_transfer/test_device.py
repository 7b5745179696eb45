"""Pools on devices: what goes to host memory, for whom, and who gets the handle."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc.aio
import pytest

from baton.errors import KvTransferError
from baton.internal.v1 import kv_pb2
from engine.gpu.device_blocks import DeviceBlocks, OpenedBlocks
from kv_transfer import local
from kv_transfer.channel import GrpcDialer, KvServicer
from kv_transfer.consumer import PullConsumer
from kv_transfer.contract import KvLayout
from kv_transfer.device import DeviceReader, DeviceServer
from kv_transfer.digest import DigestKind
from kv_transfer.producer import LeaseProducer
from kv_transfer.store import BufferStore
from kv_transfer.transport import PeerLost, Run
from tests.kv_transfer.devices import make_device, need_interpreter


@pytest.fixture
def transport() -> str:
    """Producers here have their pool on a device; consumers choose."""
    need_interpreter()
    return "cuda_ipc"


@pytest.fixture
async def pull_to_host(pair, layout: KvLayout):
    """Pull blocks with a consumer whose pool is in host memory, or who says where its device is;
    returns the transport used, and what came there."""

    async def pull(blocks, **options) -> tuple[str, list[bytes]]:
        store = BufferStore(bytearray(len(blocks) * layout.block_bytes), layout.block_bytes)
        dialer = GrpcDialer(layout.digest, **options)
        consumer = PullConsumer(store, layout, dialer)
        try:
            report = await consumer.pull(pair.publish(blocks), range(len(blocks)))
        finally:
            await consumer.close()
            await dialer.close()
        return report.transport, [bytes(store.block(i)) for i in range(len(blocks))]

    return pull


async def test_nothing_goes_to_host_memory_when_devices_copy(pair):
    report = await pair.consumer.pull(pair.publish(range(6)), range(6, 12))
    assert report.on_device
    assert pair.copied(range(6), range(6, 12))
    assert pair.staged == []
    assert not any(any(pair.host.block(i)) for i in range(6, 12))


@pytest.mark.parametrize("transport_used", ["shm", "tcp"])
async def test_a_consumer_without_a_device_gets_its_blocks_by_way_of_host_memory(
    pair, pull_to_host, transport_used
):
    await pair.consumer.pull(pair.publish([0, 1]), [0, 1])
    used, came = await pull_to_host([5, 3, 9], transports=["cuda_ipc", transport_used])
    assert used == transport_used
    assert came == [bytes(pair.source.block(i)) for i in (5, 3, 9)]
    assert sorted(pair.staged) == [3, 5, 9]


async def test_blocks_go_to_host_memory_as_they_become_final(pair, stub):
    ref = pair.publish(range(8), sealed=False)
    pair.producer.advance(ref.lease_id, 3)
    request = kv_pb2.FollowRequest(lease_id=ref.lease_id, engine_id=ref.engine_id)
    call = stub.Follow(request)
    assert list((await call.read()).blocks) == [0, 1, 2]
    assert pair.staged == [0, 1, 2]
    pair.producer.seal(ref.lease_id)
    assert list((await call.read()).blocks) == [3, 4, 5, 6, 7]
    assert pair.staged == list(range(8))


async def test_each_follower_gets_digests_of_the_kind_that_it_asks_for(pair, stub):
    ref = pair.publish(range(4))
    asked = {"engine_id": ref.engine_id, "lease_id": ref.lease_id}
    device, host, silent = [
        await stub.Follow(kv_pb2.FollowRequest(**asked, digest_kind=kind)).read()
        for kind in (kv_pb2.DIGEST_KIND_DEVICE, kv_pb2.DIGEST_KIND_XXH3, 0)
    ]
    assert device.digest_kind == kv_pb2.DIGEST_KIND_DEVICE
    assert host.digest_kind == kv_pb2.DIGEST_KIND_XXH3
    assert silent == host
    assert device.blocks == host.blocks
    assert not set(device.digests) & set(host.digests)


async def test_digests_of_another_kind_than_asked_for_are_refused(pair, monkeypatch):
    follow = KvServicer.Follow

    async def other(self, request, context):
        async for message in follow(self, request, context):
            message.digest_kind = kv_pb2.DIGEST_KIND_XXH3
            yield message

    monkeypatch.setattr(KvServicer, "Follow", other)
    await pair.consumer.pull(pair.publish([1]), [1])  # the servicer that runs is not this one
    await pair.stop_producer()
    await pair.start_producer(pair.producer.control_address)
    with pytest.raises(KvTransferError, match="another kind"):
        await pair.consumer.pull(pair.publish([1]), [1])


async def test_a_pool_in_host_memory_has_no_digests_of_a_device(pair, layout):
    producer = LeaseProducer(pair.source, layout, control_address="", on_freed=print)
    ref = producer.publish([1], 1)
    producer.seal(ref.lease_id)
    with pytest.raises(KvTransferError, match="not on a device"):
        async for _ in producer.follow(ref.lease_id, DigestKind.DEVICE):
            pass
    await producer.close()


async def test_what_is_final_on_the_device_only_cannot_be_read_from_the_host(pair, until):
    ref = pair.publish(range(4))
    await until(lambda: pair.digested(ref))
    with pytest.raises(KvTransferError, match="not in host memory"):
        pair.producer.begin_read(ref.lease_id, 0, 4)


async def test_blocks_are_not_freed_while_they_go_to_host_memory(pair, stub, until, monkeypatch):
    entered, leave = threading.Event(), threading.Event()
    save = pair.producer._digester._pool.save

    def held(blocks):
        entered.set()
        leave.wait(10.0)
        save(blocks)

    monkeypatch.setattr(pair.producer._digester._pool, "save", held)
    ref = pair.publish(range(4))
    call = stub.Follow(kv_pb2.FollowRequest(lease_id=ref.lease_id, engine_id=ref.engine_id))
    reading = asyncio.ensure_future(call.read())
    await until(entered.is_set)
    pair.producer.revoke(ref.lease_id)
    await asyncio.sleep(0.05)
    assert (pair.freed, pair.producer.leased_blocks) == ([], 4)
    leave.set()
    await until(lambda: pair.freed == [ref.lease_id])
    with pytest.raises(grpc.aio.AioRpcError):
        await reading


async def test_a_device_that_cannot_be_opened_is_passed_over_with_one_line(
    pair, pull_to_host, monkeypatch, caplog
):
    def refuse(self, handle, blocks):
        raise OSError("GPU 1 has no access to the memory of GPU 0")

    monkeypatch.setattr(DeviceBlocks, "open", refuse)
    with caplog.at_level(logging.WARNING):
        used, _ = await pull_to_host([2], device=make_device(pair.target, print))
    assert used == "shm"
    (record,) = caplog.records
    assert "no access to the memory" in record.getMessage()


async def test_another_host_is_not_offered_the_device(pair, layout):
    offered = pair.producer.connect(1, layout.digest, "elsewhere").endpoints
    assert [endpoint.transport for endpoint in offered] == ["tcp"]
    offered = pair.producer.connect(1, layout.digest, local.host_id()).endpoints
    assert [endpoint.transport for endpoint in offered] == ["cuda_ipc", "shm", "tcp"]


async def test_a_cancelled_pull_ends_only_after_its_thread(pair, monkeypatch, until):
    entered, leave = threading.Event(), threading.Event()
    copy = OpenedBlocks.copy

    def held(self, sources, into, first):
        entered.set()
        leave.wait(10.0)
        return copy(self, sources, into, first)

    monkeypatch.setattr(OpenedBlocks, "copy", held)
    ref = pair.publish(range(12))
    pull = asyncio.create_task(pair.consumer.pull(ref, range(12)))
    await until(entered.is_set)
    for _ in range(3):
        pull.cancel()
        await asyncio.sleep(0.05)
    assert not pull.done()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert pair.poisoned(11)  # no other slice began
    await until(lambda: pair.freed == [ref.lease_id])


# The server and the reader by themselves.


class Pool:
    """A device's pool that counts who has it open."""

    handle = b"the handle"

    def __init__(self) -> None:
        self.open_now = 0
        self.entered, self.leave = threading.Event(), threading.Event()
        self.leave.set()

    def open(self, handle: bytes, blocks: int) -> Pool:
        assert handle == self.handle
        self.entered.set()
        self.leave.wait(10.0)
        self.open_now += 1
        return self

    def copy(self, sources, into, first) -> list[int]:
        self.entered.set()
        self.leave.wait(10.0)
        assert self.open_now
        return [7 for _ in sources]

    def close(self) -> None:
        self.open_now -= 1


@pytest.fixture
def device() -> Pool:
    return Pool()


@pytest.fixture
async def server(device):
    server = DeviceServer(device, "test-device")
    server.start()
    yield server
    await server.close()


@pytest.fixture
def connect(server, device):
    """Open a reader, by default as an honest consumer would."""
    with ThreadPoolExecutor(2) as threads:

        async def connect(token: bytes | None = None) -> DeviceReader:
            token = server.issue_token() if token is None else token
            return await DeviceReader.open(
                server.address, token, blocks=8, device=device, threads=threads
            )

        yield connect


def run_of(digest: int = 7) -> Run:
    return Run(b"", 3, [1], [bytearray(1)], [digest], [2])


async def test_a_token_admits_once_and_only_the_same_user(server, connect, device, monkeypatch):
    token = server.issue_token()
    await (await connect(token)).close()
    for wrong in (token, bytes(32)):
        with pytest.raises(KvTransferError, match="refused"):
            await connect(wrong)
    monkeypatch.setattr(local, "peer_uid", lambda peer: -1)
    with pytest.raises(KvTransferError, match="refused"):
        await connect()


async def test_a_digest_that_differs_is_found(connect):
    reader = await connect()
    await reader.read(run_of())
    with pytest.raises(KvTransferError, match="mismatch in block 3"):
        await reader.read(run_of(8))
    await reader.close()


async def test_memory_is_let_go_when_the_last_read_has_ended(server, connect, device, until):
    reader = await connect()
    device.entered.clear()
    device.leave.clear()
    reading = asyncio.create_task(reader.read(run_of()))
    await until(device.entered.is_set)
    await server.close()
    await asyncio.sleep(0.05)
    assert device.open_now == 1
    device.leave.set()
    with pytest.raises(PeerLost):
        await reading
    await until(lambda: device.open_now == 0)
    with pytest.raises(PeerLost):
        await reader.read(run_of())
    await reader.close()
    assert device.open_now == 0


async def test_a_reader_that_is_cancelled_while_it_opens_leaves_nothing_open(
    connect, device, until
):
    device.leave.clear()
    opening = asyncio.create_task(connect())
    await until(device.entered.is_set)
    opening.cancel()
    await asyncio.sleep(0.05)
    assert not opening.done()
    device.leave.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert device.open_now == 0


def test_a_handle_that_is_too_long_is_refused(device):
    device.handle = bytes(1025)
    with pytest.raises(ValueError, match="1025 bytes"):
        DeviceServer(device, "long")
