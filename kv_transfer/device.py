"""Hand-off on one host between pools on devices: the consumer copies from the producer's memory.

The producer's device memory has a handle, which other processes of the host can open. It goes over
a unix socket (local.py), once per pair of engines. Blocks then go from device to device, one kernel
for a run of them, which also digests what it copies; host memory is not touched on either side.
When the socket ends, the consumer lets go of the memory.

What a device is, and how its memory is shared, is the business of whoever has the pools
(engine/gpu/device_blocks.py): here they are two protocols. Readers can see the whole pool, and CUDA
would let them write to it; that is the trust between two workers of one user.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Protocol

from kv_transfer.digest import DigestKind
from kv_transfer.local import LocalServer, greeted, link_to
from kv_transfer.transport import PeerLost, Run, quiet

TRANSPORT = "cuda_ipc"
_HEADER = struct.Struct("!4sH")  # magic, bytes of the handle that follows
_MAGIC = b"BKD1"
_MAX_HANDLE = 1024


class SourcePool(Protocol):
    """The device pool of a producer. Its BlockStore has the same blocks in host memory, once they
    are saved. Methods block, and are called by one thread at a time, when the blocks that they
    name are final: what computed them is over."""

    @property
    def handle(self) -> bytes:
        """By which other processes open the pool; at most 1024 bytes."""
        ...

    def digests(self, blocks: Sequence[int], first: int) -> list[int]:
        """64 bits for each block, by its bytes and its position in the lease: `first`, `first + 1`
        and so on. Equal to those of `OpenedPool.copy` wherever both are equal."""
        ...

    def save(self, blocks: Sequence[int]) -> None:
        """Bring these blocks into the BlockStore."""
        ...


class OpenedPool(Protocol):
    """A producer's pool, as a consumer sees it. Methods block and are called by any thread."""

    def copy(self, sources: Sequence[int], into: Sequence[int], first: int) -> list[int]:
        """Copy the producer's blocks `sources` into the local blocks `into`, and return the digests
        of what was copied, at positions from `first` on. When this ends nothing writes into them
        any more, and whatever the device is given from now on finds them there."""
        ...

    def close(self) -> None:
        """Let go of the producer's memory. Nothing is being copied."""
        ...


class TargetPool(Protocol):
    """The device pool of a consumer."""

    def open(self, handle: bytes, blocks: int) -> OpenedPool:
        """Open a producer's pool of `blocks` blocks of the same size. Blocks. Raises OSError or
        ValueError if it cannot be had from here."""
        ...


class DeviceServer(LocalServer):
    """Gives the pool's handle to peers of the same user that hold a token."""

    def __init__(self, pool: SourcePool, name: str) -> None:
        if len(pool.handle) > _MAX_HANDLE:
            raise ValueError(f"a handle of {len(pool.handle)} bytes")
        greeting = _HEADER.pack(_MAGIC, len(pool.handle)) + pool.handle
        super().__init__(f"baton-kv-device-{name}", greeting)


class DeviceReader:
    """Copies blocks out of a producer's opened pool into the device's own."""

    transport = TRANSPORT
    digest_kind = DigestKind.DEVICE

    def __init__(self, link: socket.socket, pool: OpenedPool, threads: Executor) -> None:
        self._link = link
        self._pool = pool
        self._threads = threads
        self._reading = 0
        self._lost = False
        asyncio.get_running_loop().add_reader(link, self._ended)

    @classmethod
    async def open(
        cls, address: str, token: bytes, *, blocks: int, device: TargetPool, threads: Executor
    ) -> DeviceReader:
        """Open the pool behind `address`, of `blocks` blocks. Raises KvTransferError as link_to."""
        with link_to("device memory") as link:
            handle = await _receive_handle(link, address, token)
            pool = await _open(device, handle, blocks, threads)
        return cls(link, pool, threads)

    async def read(self, run: Run) -> None:
        """Copy and verify every block. Raises PeerLost when the producer has gone."""
        if self._lost:
            raise PeerLost("producer is gone")
        self._reading += 1
        loop = asyncio.get_running_loop()
        try:
            await quiet(loop.run_in_executor(self._threads, self._copy, run), run.stop)
        finally:
            self._reading -= 1
            self._close_if_quiet()
        if self._lost:
            raise PeerLost("producer went while its memory was read")

    async def close(self) -> None:
        """Let go of the pool once the last read has ended."""
        self._ended()

    def _copy(self, run: Run) -> None:
        run.check_wanted()
        run.arrive(self._pool.copy(run.sources, run.into, run.first))

    def _ended(self) -> None:
        """The producer closed the connection (it never writes), or we do."""
        if not self._lost:
            self._lost = True
            asyncio.get_running_loop().remove_reader(self._link)
            self._link.close()
            self._close_if_quiet()

    def _close_if_quiet(self) -> None:
        if self._lost and not self._reading:
            self._threads.submit(self._pool.close)  # the driver may wait for the device


async def _receive_handle(link: socket.socket, address: str, token: bytes) -> bytes:
    """Do the handshake on `link`."""
    greeting, _ = await greeted(link, address, token, _HEADER.size + _MAX_HANDLE)
    if len(greeting) < _HEADER.size:
        raise ConnectionError("the producer refused")
    magic, size = _HEADER.unpack_from(greeting)
    handle = greeting[_HEADER.size :]
    if magic != _MAGIC or len(handle) != size:
        raise ConnectionError("not the pool that was announced")
    return handle


async def _open(device: TargetPool, handle: bytes, blocks: int, threads: Executor) -> OpenedPool:
    """Open in a thread; a cancellation leaves nothing open."""
    work = asyncio.get_running_loop().run_in_executor(threads, device.open, handle, blocks)
    try:
        return await quiet(work, lambda: None)
    except asyncio.CancelledError:
        if not work.cancelled() and work.exception() is None:
            work.result().close()
        raise
