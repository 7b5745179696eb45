"""Hand-off on one host: the consumer maps the producer's pool and copies once, pool to pool.

The producer's pool is a memfd, sealed so that it can neither shrink under a reader (SIGBUS) nor be
mapped writable by anyone who receives it. The descriptor goes over a unix socket (local.py), once
per pair of engines.

Linux only. Readers can see the whole pool; that is the trust between two workers of one user.
"""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import socket
import struct
from concurrent.futures import Executor

import numpy as np

from baton.errors import KvTransferError
from kv_transfer.contract import BlockStore
from kv_transfer.digest import DigestKind
from kv_transfer.local import LocalServer, greeted, link_to
from kv_transfer.store import block_array
from kv_transfer.transport import INLINE_BYTES, PeerLost, Run, quiet

F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; in Python's fcntl since 3.13
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_GREETING = struct.Struct("!4sQ")  # magic, bytes of the pool
_MAGIC = b"BKS1"


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


class ShmServer(LocalServer):
    """Gives the pool's descriptor to peers of the same user that hold a token."""

    def __init__(self, pool: SharedPool, name: str) -> None:
        super().__init__(f"baton-kv-{name}", _GREETING.pack(_MAGIC, pool.size), [pool.fd])
        self._pool = pool

    def start(self) -> None:
        """Seal the pool, and listen. When it ends, maps of peers stay readable."""
        self._pool.seal()
        super().start()


class ShmReader:
    """Copies blocks out of a producer's mapped pool."""

    transport = "shm"
    digest_kind = DigestKind.XXH3

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
        """Map the pool behind `address`, which must hold `blocks` blocks. Raises KvTransferError as
        link_to."""
        with link_to("shared memory") as link:
            pool = await _receive_pool(link, address, token, blocks * block_bytes)
        return cls(link, pool, block_bytes, threads)

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
            run.check_wanted()
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


async def _receive_pool(link: socket.socket, address: str, token: bytes, size: int) -> mmap.mmap:
    """Do the handshake on `link` and map at least `size` bytes read-only."""
    greeting, descriptors = await greeted(link, address, token, _GREETING.size, 1)
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
