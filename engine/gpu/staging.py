"""The KV of a device pool in host memory, the same blocks: see engine/staged.py.

Many blocks are gathered into one buffer on the device, cross the bus in one copy, and go beside the
passes, on a stream of their own. Where others can copy from the device itself (device_blocks.py),
blocks are saved only for those who cannot. What a prefill worker has found of a prefix has been
saved before, then.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.gpu.kernels.blocks import gather, scatter
from engine.gpu.transfer import on
from engine.model.pool import KvGeometry, KvPool, Portion, numbers_and_scales

if TYPE_CHECKING:
    from engine.gpu.device_blocks import DeviceBlocks

_BUFFER_BYTES = 32 * 2**20  # that cross at once
_KEPT_BYTES = 2 * 2**30  # of a consumer's memory, for the blocks that come next
_PAGE = mmap.PAGESIZE


class Staging:
    """The StagedBlocks of a pool on one device.

    Memory is touched, and so taken, when a block first crosses. What others may map stays so, up to
    the size of the pool. Where blocks are only loaded from, what is beyond 2 GiB is given back.
    """

    def __init__(
        self,
        pool: KvPool,
        buffer: memoryview | mmap.mmap | None = None,
        portion: Portion | None = None,
    ) -> None:
        """`buffer`: writable memory of `blocks * block_bytes`, such as a shared mapping. `portion`:
        the pool has only that of each block, and only that crosses."""
        geometry = portion.whole if portion else pool.geometry
        self.blocks, self.block_bytes = pool.blocks, geometry.block_bytes
        size = self.blocks * self.block_bytes
        self._own: mmap.mmap | None = None
        self._kept: set[int] = set()  # blocks that keep their part of it
        if buffer is None:
            buffer = self._own = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(buffer).cast("B")[:size]
        bytes_here = torch.frombuffer(self._view, dtype=torch.uint8).view(self.blocks, -1)
        self._here = [bytes_here.numpy()]
        if portion:
            self._here = _arrays(portion.of(_blocks(bytes_here, geometry)))
        self._most = max(1, _BUFFER_BYTES // pool.block_bytes)
        divided = portion is not None
        self._saving, self._loading = (_Lane(pool, self._most, divided=divided) for _ in range(2))
        self.device: DeviceBlocks | None = None  # who goes past the host, if anybody can

    def block(self, index: int) -> memoryview:
        """See StagedBlocks."""
        if not 0 <= index < self.blocks:
            raise IndexError(f"block {index} of a pool of {self.blocks}")
        return self._view[index * self.block_bytes : (index + 1) * self.block_bytes]

    def save(self, blocks: Items[int], *, settled: bool = False) -> None:
        """See StagedBlocks; beside what the device was given so far if they are `settled`."""
        with self._saving as lane:
            for some in _pieces(blocks, self._most):
                lane.gather(some, settled=settled)
                for here, there in zip(self._here, lane.arrays, strict=True):
                    for row, block in enumerate(some):
                        np.copyto(here[block], there[row])

    def load(self, blocks: Items[int]) -> None:
        """See StagedBlocks."""
        with self._loading as lane:
            for some in _pieces(blocks, self._most):
                for here, there in zip(self._here, lane.arrays, strict=True):
                    for row, block in enumerate(some):
                        np.copyto(there[row], here[block])
                lane.scatter(some)
        if self._own is not None:
            self._give_back(self._own, blocks)

    def _give_back(self, memory: mmap.mmap, blocks: Items[int]) -> None:
        """The memory of these blocks, which are on the device now, but for what is kept. Nobody
        fills them meanwhile: they are under a sequence that has not begun."""
        for block in blocks:
            if len(self._kept) * self.block_bytes < _KEPT_BYTES:
                self._kept.add(block)
            if block not in self._kept:
                first = -(-block * self.block_bytes // _PAGE) * _PAGE
                whole = (block + 1) * self.block_bytes // _PAGE * _PAGE - first
                if whole > 0:
                    memory.madvise(mmap.MADV_DONTNEED, first, whole)


def _blocks(rows: Tensor, geometry: KvGeometry) -> Tensor:
    """Bytes [N, block_bytes] as blocks [N, *block_shape]."""
    return rows.view(getattr(torch, geometry.dtype)).view(len(rows), *geometry.block_shape)


def _arrays(parts: tuple[Tensor, ...]) -> list[NDArray[np.uint8]]:
    """The same memory as bytes: numpy knows fewer formats."""
    return [part.view(torch.uint8).numpy() for part in parts]


class _Lane:
    """One direction: a stream, a buffer on the device and its page-locked twin on the host."""

    def __init__(self, pool: KvPool, blocks: int, *, divided: bool) -> None:
        """`divided`: `arrays` are numbers and scales, else whole blocks."""
        self._geometry, self._divided = pool.geometry, divided
        self._storage = pool.storage
        self._device = pool.storage.device
        self._cuda = self._device.type == "cuda"
        self._lock = threading.Lock()
        self._stream = torch.cuda.Stream(self._device) if self._cuda else None  # type: ignore[no-untyped-call]
        self._buffer: Tensor | None = None
        self._blocks, self._block_bytes = blocks, pool.block_bytes

    def __enter__(self) -> _Lane:
        self._lock.acquire()
        if self._buffer is None:
            shape = (self._blocks, self._block_bytes)
            with on(self._stream):  # not memory that a pass under way still uses
                self._buffer = torch.empty(shape, dtype=torch.uint8, device=self._device)
            self.host = torch.empty(shape, dtype=torch.uint8, pin_memory=self._cuda)
            self.arrays = [self.host.numpy()]
            if self._divided:
                parts = numbers_and_scales(_blocks(self.host, self._geometry), self._geometry)
                self.arrays = _arrays(parts)
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def gather(self, blocks: Items[int], *, settled: bool) -> None:
        """Bring these blocks of the pool into the first rows of `host`."""
        assert self._buffer is not None
        with self._beside_the_passes() if settled else self._behind_the_passes():
            rows = self._buffer[: len(blocks)]
            gather(self._storage, self._ids(blocks), rows)
            self.host[: len(blocks)].copy_(rows, non_blocking=True)

    def scatter(self, blocks: Items[int]) -> None:
        """Bring the first rows of `host` into these blocks of the pool."""
        assert self._buffer is not None
        with self._behind_the_passes():
            rows = self._buffer[: len(blocks)]
            rows.copy_(self.host[: len(blocks)], non_blocking=True)
            scatter(self._ids(blocks), rows, self._storage)

    def _ids(self, blocks: Items[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self._device)

    @contextlib.contextmanager
    def _behind_the_passes(self) -> Iterator[None]:
        """On this lane's stream, after what the passes' stream has now; waits for the end."""
        if self._stream is None:
            yield
            return
        passes = torch.cuda.default_stream(self._device)
        self._stream.wait_event(passes.record_event())
        with self._beside_the_passes():
            yield

    @contextlib.contextmanager
    def _beside_the_passes(self) -> Iterator[None]:
        """On this lane's stream; waits for the end."""
        with on(self._stream):
            yield
        if self._stream is not None:
            self._stream.synchronize()


def _pieces(blocks: Items[int], most: int) -> Iterator[Items[int]]:
    for first in range(0, len(blocks), most):
        yield blocks[first : first + most]
