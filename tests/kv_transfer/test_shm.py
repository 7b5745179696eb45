"""Shared memory: what the seals hold, and who gets the descriptor."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

import kv_transfer.local
from baton.errors import KvTransferError
from kv_transfer.digest import block_digest
from kv_transfer.local import host_id
from kv_transfer.shm import SharedPool, ShmReader, ShmServer, allocate
from kv_transfer.store import BufferStore, block_array
from kv_transfer.transport import PeerLost, Run

SIZE = 4096


@pytest.fixture
def pool():
    pool = allocate(8 * SIZE)
    yield pool
    pool.close()


@pytest.fixture
async def server(pool: SharedPool):
    server = ShmServer(pool, f"test-{os.urandom(8).hex()}")
    server.start()
    yield server
    await server.close()


@pytest.fixture
def connect(server):
    """Open a reader, by default as an honest consumer would."""

    async def connect(token: bytes | None = None, blocks: int = 8) -> ShmReader:
        token = server.issue_token() if token is None else token
        with ThreadPoolExecutor(1) as threads:
            return await ShmReader.open(
                server.address, token, blocks=blocks, block_bytes=SIZE, threads=threads
            )

    return connect


def run_of(pool: SharedPool, source: int, target: bytearray) -> Run:
    digest = block_digest(pool.buffer[source * SIZE : (source + 1) * SIZE], 0)
    return Run(b"", 0, [source], [block_array(BufferStore(target, SIZE), 0)], [digest])


def test_nobody_can_resize_a_sealed_pool_or_map_it_writable(pool):
    pool.seal()
    with pytest.raises(PermissionError):
        os.ftruncate(pool.fd, SIZE)
    with pytest.raises(PermissionError):
        os.ftruncate(pool.fd, 16 * SIZE)
    with pytest.raises(PermissionError):
        mmap.mmap(pool.fd, 8 * SIZE)
    with pytest.raises(PermissionError):
        os.pwrite(pool.fd, b"x", 0)
    with mmap.mmap(pool.fd, 8 * SIZE, prot=mmap.PROT_READ) as readable:
        pool.buffer[SIZE] = 9
        assert readable[SIZE] == 9


def test_the_owner_s_views_outlive_the_descriptor(pool):
    pool.close()
    pool.close()
    pool.buffer[0] = 1
    assert pool.buffer[0] == 1


def test_a_store_that_lies_elsewhere_is_noticed(pool):
    assert pool.holds(BufferStore(pool.buffer, SIZE))
    assert not pool.holds(BufferStore(pool.buffer[SIZE:], SIZE))
    assert not pool.holds(BufferStore(bytearray(8 * SIZE), SIZE))


async def test_a_reader_sees_what_the_owner_writes_later(pool, connect):
    reader = await connect()
    pool.buffer[3 * SIZE : 4 * SIZE] = b"k" * SIZE
    target = bytearray(SIZE)
    await reader.read(run_of(pool, 3, target))
    assert target == b"k" * SIZE
    await reader.close()


@pytest.mark.parametrize("source", [-1, 8, 2**40])
async def test_a_block_outside_the_pool_is_refused(pool, connect, source):
    reader = await connect()
    run = Run(b"", 0, [source], [block_array(BufferStore(bytearray(SIZE), SIZE), 0)], [0])
    with pytest.raises(KvTransferError, match="outside"):
        await reader.read(run)
    await reader.close()


async def test_a_token_admits_once(server, connect):
    token = server.issue_token()
    await (await connect(token)).close()
    for wrong in (token, bytes(32)):
        with pytest.raises(KvTransferError, match="refused"):
            await connect(wrong)


async def test_another_user_is_refused(server, connect, monkeypatch):
    monkeypatch.setattr(kv_transfer.local, "peer_uid", lambda peer: os.getuid() + 1)
    with pytest.raises(KvTransferError, match="refused"):
        await connect()


async def test_a_pool_smaller_than_announced_is_not_mapped(connect):
    with pytest.raises(KvTransferError, match="not the pool"):
        await connect(blocks=9)


async def test_silent_and_garbage_peers_harm_nobody(server, connect, monkeypatch):
    monkeypatch.setattr(kv_transfer.local, "_HANDSHAKE_SECONDS", 0.2)
    with contextlib.ExitStack() as stack:
        for words in (b"", b"\0" * 7, b"garbage " * 100):
            peer = stack.enter_context(socket.socket(socket.AF_UNIX))
            peer.connect("\0" + server.address)
            peer.sendall(words)
        await (await connect()).close()
        await asyncio.sleep(0.3)
        assert len(server._tasks) == 1  # only the listener: all three were turned away


async def test_a_producer_that_goes_is_noticed_and_its_memory_let_go(pool, server, connect):
    reader = await connect()
    await server.close()
    await asyncio.sleep(0.05)
    with pytest.raises(PeerLost):
        await reader.read(run_of(pool, 0, bytearray(SIZE)))
    assert len(reader._pool) == 0


async def test_no_server_is_an_error():
    with ThreadPoolExecutor(1) as threads, pytest.raises(KvTransferError):
        await ShmReader.open("baton-kv-nobody", b"", blocks=1, block_bytes=1, threads=threads)


def test_two_processes_of_one_user_on_one_host_agree():
    assert host_id() == host_id()
    assert len(host_id()) == 32
