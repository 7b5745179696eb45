"""Hand-off on one host: the consumer maps the producer's pool and copies once, pool to pool.

The producer's pool is a memfd, sealed so that it can neither shrink under a reader (SIGBUS) nor be
mapped writable by anyone who receives it. The descriptor goes over an abstract unix socket, once
per pair of engines, to a peer of the same user that shows a one-use token. The socket then stays
open and silent: its end tells the consumer that the producer is gone. Nothing has a name in a
file system, so nothing is left behind by SIGKILL.

Linux only. Readers can see the whole pool; that is the trust between two workers of one user.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import mmap
import os
import socket
import struct
import time
from collections.abc import Coroutine
from concurrent.futures import Executor
from pathlib import Path

import numpy as np

from baton.errors import KvTransferError
from kv_transfer.contract import BlockStore
from kv_transfer.sockets import receive_exactly
from kv_transfer.store import block_array
from kv_transfer.transport import (
    INLINE_BYTES,
    TOKEN_BYTES,
    PeerLost,
    Run,
    Tokens,
    quiet,
)

F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; in Python's fcntl since 3.13
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_GREETING = struct.Struct("!4sQ")  # magic, bytes of the pool
_MAGIC = b"BKS1"
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_HANDSHAKE_SECONDS = 5.0
_MAX_PEERS = 256


class SharedPool:
    """A block of memory that other processes can map, read-only once it is sealed: until then
    those who compute together with this process may map it, too. Zeroed; `buffer` is writable and
    must outlive whatever is built on it (torch.frombuffer, BufferStore)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            self._map = mmap.mmap(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
        except OSError:
            os.close(self.fd)
            raise
        self.buffer = memoryview(self._map)

    def seal(self) -> None:
        """From now on nobody maps it writable; who has, keeps that. Idempotent."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)

    def holds(self, store: BlockStore) -> bool:
        """Whether block i of `store` lies at i * block_bytes of this pool, as readers assume."""
        base = np.frombuffer(self.buffer, np.uint8).ctypes.data
        return store.blocks * store.block_bytes <= self.size and all(
            block_array(store, i).ctypes.data == base + i * store.block_bytes
            for i in {0, store.blocks - 1}
        )

    def close(self) -> None:
        """Give up the descriptor. The memory itself goes with the last view of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def allocate(size: int) -> SharedPool:
    """Memory for a producer's KV pool, of `size` bytes. Raises OSError when there is none."""
    return SharedPool(size)


def host_id() -> str:
    """Equal for two processes that can share memory this way: same boot, network namespace (the
    abstract socket's scope), user namespace and user."""
    spaces = [str(Path(f"/proc/self/ns/{name}").stat().st_ino) for name in ("net", "user")]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.sha256(":".join([boot, *spaces, str(os.getuid())]).encode()).hexdigest()[:32]


class ShmServer:
    """Gives the pool's descriptor to peers of the same user that hold a token."""

    def __init__(self, pool: SharedPool, name: str) -> None:
        self.address = f"baton-kv-{name}"
        self._pool = pool
        self._tokens = Tokens()
        self._tasks: set[asyncio.Task[None]] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def start(self) -> None:
        """Seal the pool, and listen."""
        self._pool.seal()
        self._listener.setblocking(False)
        self._listener.bind(b"\0" + self.address.encode())
        self._listener.listen(64)
        self._spawn(self._accept())

    def issue_token(self) -> bytes:
        """A token for one connection."""
        return self._tokens.issue(time.monotonic())

    async def close(self) -> None:
        """Stop listening; peers see the end of their connections. Their maps stay readable."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            peer, _ = await loop.sock_accept(self._listener)
            if len(self._tasks) > _MAX_PEERS:
                peer.close()
                continue
            self._spawn(self._serve(peer))

    async def _serve(self, peer: socket.socket) -> None:
        """Hand out the descriptor, then hold the connection until the peer goes."""
        loop = asyncio.get_running_loop()
        with peer:
            peer.setblocking(False)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_HANDSHAKE_SECONDS):
                    token = await receive_exactly(peer, TOKEN_BYTES)
                if peer_uid(peer) != os.getuid():
                    return
                if not self._tokens.redeem(token, time.monotonic()):
                    return
                socket.send_fds(peer, [_GREETING.pack(_MAGIC, self._pool.size)], [self._pool.fd])
                await loop.sock_recv(peer, 1)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def peer_uid(peer: socket.socket) -> int:
    """The user at the other end of a unix socket, as the kernel knows it."""
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return int(uid)


class ShmReader:
    """Copies blocks out of a producer's mapped pool."""

    transport = "shm"

    def __init__(
        self, link: socket.socket, pool: mmap.mmap, block_bytes: int, threads: Executor
    ) -> None:
        self._link = link
        self._pool = np.frombuffer(pool, np.uint8)
        self._block_bytes = block_bytes
        self._threads = threads
        self._lost = False
        asyncio.get_running_loop().add_reader(link, self._ended)

    @classmethod
    async def open(
        cls, address: str, token: bytes, *, blocks: int, block_bytes: int, threads: Executor
    ) -> ShmReader:
        """Map the pool behind `address`, which must hold `blocks` blocks. Raises KvTransferError
        when that cannot be done, which says nothing about the producer's health."""
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                pool = await _receive_pool(link, address, token, blocks * block_bytes)
            return cls(link, pool, block_bytes, threads)
        except (OSError, ValueError, struct.error) as error:
            link.close()
            raise KvTransferError(f"shared memory: {error or type(error).__name__}") from error
        except BaseException:
            link.close()
            raise

    async def read(self, run: Run) -> None:
        """Fill and land every target. Raises PeerLost when the producer has gone."""
        if self._lost:
            raise PeerLost("producer is gone")
        if run.bytes <= INLINE_BYTES:
            self._copy(run)
            return
        loop = asyncio.get_running_loop()
        await quiet(loop.run_in_executor(self._threads, self._copy, run), run.stop)

    async def close(self) -> None:
        """Unmap once the last read has ended."""
        self._ended()

    def _copy(self, run: Run) -> None:
        pool, size = self._pool, self._block_bytes
        for index, (source, target) in enumerate(zip(run.sources, run.targets, strict=True)):
            start = source * size
            if not 0 <= start <= len(pool) - size:
                raise KvTransferError(f"block {source} is outside the producer's pool")
            if run.stopped:
                raise KvTransferError("transfer was given up")
            np.copyto(target, pool[start : start + size])
            run.land(index)

    def _ended(self) -> None:
        """The producer closed the connection (it never writes), or we do. The map goes with the
        last thread that copies from it: a dead producer's memory is not kept."""
        if not self._lost:
            self._lost = True
            self._pool = np.empty(0, np.uint8)
            asyncio.get_running_loop().remove_reader(self._link)
            self._link.close()


async def _readable(sock: socket.socket) -> None:
    """Wait until there is something to receive: asyncio itself cannot receive descriptors."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)


async def _receive_pool(link: socket.socket, address: str, token: bytes, size: int) -> mmap.mmap:
    """Do the handshake on `link` and map at least `size` bytes read-only."""
    loop = asyncio.get_running_loop()
    link.setblocking(False)
    await loop.sock_connect(link, b"\0" + address.encode())
    await loop.sock_sendall(link, token)
    await _readable(link)
    greeting, descriptors, _, _ = socket.recv_fds(link, _GREETING.size, 1)
    try:
        if len(greeting) < _GREETING.size or not descriptors:
            raise ConnectionError("the producer refused")
        magic, pool_size = _GREETING.unpack(greeting)
        seals = fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS)
        actual = os.fstat(descriptors[0]).st_size
        if magic != _MAGIC or not seals & fcntl.F_SEAL_SHRINK or not size <= pool_size <= actual:
            raise ConnectionError("not the pool that was announced")
        return mmap.mmap(descriptors[0], actual, prot=mmap.PROT_READ)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
