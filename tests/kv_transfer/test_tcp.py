"""The TCP data channel against peers that are slow, silent or hostile."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from baton.errors import KvTransferError
from kv_transfer import tcp
from kv_transfer.digest import block_digest
from kv_transfer.store import BufferStore, block_array
from kv_transfer.tcp import TcpReader, TcpServer
from kv_transfer.transport import DataEndpoint, PeerLost, Run

SIZE = 65536
LEASE = b"L" * 16


class Leases:
    """Positions of one lease are the blocks of the same number; counts who reads."""

    def __init__(self) -> None:
        self.readers = 0

    def begin_read(self, lease_id, first, count):
        if lease_id != LEASE or first + count > 32:
            raise KvTransferError("lease is gone")
        self.readers += 1
        return range(first, first + count)

    def end_read(self, lease_id):
        self.readers -= 1


@pytest.fixture
def store() -> BufferStore:
    numbers = np.random.default_rng(1).integers(0, 256, 40 * SIZE, np.uint8)
    return BufferStore(bytearray(numbers), SIZE)


@pytest.fixture
def leases() -> Leases:
    return Leases()


@pytest.fixture
async def server(store, leases):
    server = TcpServer(leases, store, "127.0.0.1:0", stall=0.5)
    server.start()
    yield server
    await server.close()
    assert leases.readers == 0


@pytest.fixture
async def reader(server):
    async def endpoint() -> DataEndpoint:
        return DataEndpoint("tcp", server.address, server.issue_token())

    with ThreadPoolExecutor(4) as threads:
        reader = TcpReader(endpoint, block_bytes=SIZE, stall=0.5, threads=threads)
        yield reader
        await reader.close()


def run_of(store: BufferStore, first: int, count: int, lease: bytes = LEASE) -> Run:
    target = BufferStore(bytearray(count * SIZE), SIZE)
    sources = range(first, first + count)
    digests = [block_digest(store.block(i), i) for i in sources]
    return Run(lease, first, sources, [block_array(target, i) for i in range(count)], digests)


async def connected(server: TcpServer, token: bytes | None = None) -> socket.socket:
    """A raw client that has said hello."""
    host, _, port = server.address.rpartition(":")
    raw = socket.create_connection((host, int(port)), timeout=2.0)
    raw.sendall(tcp._HELLO.pack(tcp._MAGIC, server.issue_token() if token is None else token))
    await asyncio.sleep(0.02)
    return raw


async def closed(raw: socket.socket) -> bool:
    """Whether the server ended the connection without a byte."""
    try:
        return await asyncio.to_thread(raw.recv, 1) == b""
    except ConnectionError:
        return True
    finally:
        raw.close()


async def test_connections_are_used_again(store, server, reader):
    for first in range(5):
        run = run_of(store, first, 20)
        await reader.read(run)
        assert run.landed == 20
    assert len(server._tasks) == 2  # the listener and one connection


async def test_what_a_failed_run_left_behind_does_not_meet_the_next_one(store, reader, leases):
    for _ in range(3):
        run = run_of(store, 0, 32)
        run.digests[1] ^= 1
        with pytest.raises(KvTransferError, match="digest mismatch in block 1"):
            await reader.read(run)
        await reader.read(run_of(store, 3, 5))


async def test_a_consumer_that_closes_with_its_window_shut_is_noticed(server, leases, until):
    server._stall = 60.0
    raw = await connected(server)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(8):
        raw.sendall(tcp._REQUEST.pack(tcp._MAGIC, 0, 32, LEASE))
    await until(lambda: leases.readers)
    raw.shutdown(socket.SHUT_RDWR)
    await until(lambda: not leases.readers, 2.0)
    raw.close()


async def test_a_connection_that_ended_while_idle_is_replaced(store, server, reader):
    await reader.read(run_of(store, 0, 4))
    for peer in [task for task in server._tasks if "_serve" in repr(task)]:
        peer.cancel()
    await asyncio.sleep(0.02)
    await reader.read(run_of(store, 4, 4))


async def test_a_lease_that_is_gone_is_said_so_and_the_next_read_works(store, server, reader):
    for _ in range(2):
        with pytest.raises(KvTransferError, match="gone"):
            await reader.read(run_of(store, 0, 1, b"?" * 16))
    await reader.read(run_of(store, 0, 1))


async def test_without_a_good_token_there_is_nothing(server):
    used = server.issue_token()
    raw = await connected(server, used)
    assert await closed(await connected(server, used))
    assert await closed(await connected(server, bytes(32)))
    raw.close()


@pytest.mark.parametrize(
    "frame",
    [
        tcp._REQUEST.pack(b"GET ", 0, 1, LEASE),
        tcp._REQUEST.pack(tcp._MAGIC, 0, 0, LEASE),
        tcp._REQUEST.pack(tcp._MAGIC, 0, 2**32 - 1, LEASE),
        tcp._REQUEST.pack(tcp._MAGIC, 0, tcp.MAX_RUN_BYTES // SIZE + 1, LEASE),
        random.Random(0).randbytes(4096),
    ],
)
async def test_garbage_ends_its_connection_and_harms_no_other(store, server, reader, frame):
    raw = await connected(server)
    raw.sendall(frame)
    assert await closed(raw)
    await reader.read(run_of(store, 0, 8))


@pytest.mark.parametrize("first", [2**31, 2**32 - 1, 32])
async def test_positions_beyond_the_lease_are_refused(server, first):
    raw = await connected(server)
    raw.sendall(tcp._REQUEST.pack(tcp._MAGIC, first, 1, LEASE))
    reply = await asyncio.to_thread(raw.recv, tcp._REPLY.size)
    assert tcp._REPLY.unpack(reply)[1:5] == (tcp._GONE, first, 0, 0)
    raw.close()


async def test_half_a_request_does_not_hold_a_connection_for_ever(server, monkeypatch):
    monkeypatch.setattr(tcp, "_HANDSHAKE_SECONDS", 0.1)
    raw = await connected(server)
    raw.sendall(tcp._REQUEST.pack(tcp._MAGIC, 0, 1, LEASE)[:10])
    assert await closed(raw)


async def test_a_consumer_that_does_not_read_is_given_up(store, server, leases, reader, until):
    raw = await connected(server)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(8):
        raw.sendall(tcp._REQUEST.pack(tcp._MAGIC, 0, 32, LEASE))
    await asyncio.sleep(0.2)
    assert leases.readers == 1
    await reader.read(run_of(store, 0, 8))  # others are served meanwhile
    await until(lambda: leases.readers == 0)
    raw.close()


async def test_a_lease_taken_back_frees_its_blocks_whoever_reads_them(server, leases):
    raw = await connected(server)
    for _ in range(8):
        raw.sendall(tcp._REQUEST.pack(tcp._MAGIC, 0, 32, LEASE))
    await asyncio.sleep(0.1)
    server.stop_sending(LEASE)
    await asyncio.sleep(0.1)
    assert leases.readers == 0
    raw.close()


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (None, "no progress"),
        (b"", "ended"),
        (b"HTTP/1.1 200 OK\r\n" + b" " * 99, "something else"),
        (tcp._REPLY.pack(tcp._MAGIC, 0, 0, 2, 2 * SIZE, b"?" * 16), "something else"),
        (tcp._REPLY.pack(tcp._MAGIC, 0, 1, 2, 2 * SIZE, LEASE), "something else"),
        (tcp._REPLY.pack(tcp._MAGIC, 0, 0, 2, 2**62, LEASE), "wrong length"),
        (tcp._REPLY.pack(tcp._MAGIC, 0, 0, 1, SIZE, LEASE), "wrong length"),
        (tcp._REPLY.pack(tcp._MAGIC, 0, 0, 2, 2 * SIZE, LEASE) + b"x" * SIZE, "ended|digest"),
    ],
)
async def test_a_producer_that_answers_nonsense_is_an_error_in_time(store, reply, message):
    release = threading.Event()

    def serve(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(tcp._HELLO.size + tcp._REQUEST.size, socket.MSG_WAITALL)
            if reply is None:
                release.wait(5.0)
            else:
                peer.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(2) as threads:
        threads.submit(serve, listener)
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        async def endpoint() -> DataEndpoint:
            return DataEndpoint("tcp", address, bytes(32))

        reader = TcpReader(endpoint, block_bytes=SIZE, stall=0.3, threads=threads)
        started = time.monotonic()
        with pytest.raises(KvTransferError, match=message):
            await reader.read(run_of(store, 0, 2))
        assert time.monotonic() - started < 2.0
        release.set()
        await reader.close()


async def test_nobody_listening_is_an_error(store):
    async def endpoint() -> DataEndpoint:
        return DataEndpoint("tcp", "127.0.0.1:1", bytes(32))

    with ThreadPoolExecutor(1) as threads:
        reader = TcpReader(endpoint, block_bytes=SIZE, stall=1.0, threads=threads)
        with pytest.raises(PeerLost):
            await reader.read(run_of(store, 0, 1))


def test_the_reply_header_has_a_fixed_size():
    assert tcp._REPLY.size == struct.calcsize("!4sIIIQ16s") == 40
