"""The KV of a device pool as the hand-off sees it: the same blocks in host memory.

A prefill worker saves the blocks that a pass has finished: before their lease says that they are
final, or if others can copy from the device itself (device_blocks.py), only for those who cannot.
What it has found of a prefix has been saved before, then. A decode worker loads the blocks that a
pull has brought, before their sequence runs. Either way many blocks are gathered into one buffer on
the device, cross the bus in one copy, and go beside the passes, on a stream of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.executor import Executor, Pipeline
from engine.gpu.kernels.blocks import gather, scatter
from engine.gpu.transfer import on
from engine.model.pool import KvGeometry, KvPool, Portion, numbers_and_scales
from scheduling.plan import Capacity, StepPlan, StepResult

if TYPE_CHECKING:
    from engine.gpu.device_blocks import DeviceBlocks

_BUFFER_BYTES = 32 * 2**20  # that cross at once


def finished_blocks(plan: StepPlan, block_size: int) -> list[int]:
    """Blocks that nobody writes to after the pass, unless to generate: those it fills, and the last
    one of each prompt that it completes."""
    found: list[int] = []
    for chunk in plan.chunks:
        end = chunk.start + chunk.length
        until = -(-end // block_size) if chunk.sample else end // block_size
        found += chunk.sequence.blocks[chunk.start // block_size : until]
    return found


class Staging:
    """A BlockStore (kv_transfer/contract.py) beside a device pool, block for block.

    Memory is touched, and so taken, when a block first crosses.
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
        self._view = memoryview(mmap.mmap(-1, size) if buffer is None else buffer).cast("B")[:size]
        bytes_here = torch.frombuffer(self._view, dtype=torch.uint8).view(self.blocks, -1)
        self._here = [bytes_here.numpy()]
        if portion:
            self._here = _arrays(portion.of(_blocks(bytes_here, geometry)))
        self._most = max(1, _BUFFER_BYTES // pool.block_bytes)
        divided = portion is not None
        self._saving, self._loading = (_Lane(pool, self._most, divided=divided) for _ in range(2))
        self.device: DeviceBlocks | None = None  # who goes past the host, if anybody can

    def block(self, index: int) -> memoryview:
        """Writable bytes of one block in host memory."""
        if not 0 <= index < self.blocks:
            raise IndexError(f"block {index} of a pool of {self.blocks}")
        return self._view[index * self.block_bytes : (index + 1) * self.block_bytes]

    def save(self, blocks: Items[int], *, settled: bool = False) -> None:
        """Copy from the device, behind all that it was given so far, or if they are `settled`
        beside it. Returns when they are here."""
        with self._saving as lane:
            for some in _pieces(blocks, self._most):
                lane.gather(some, settled=settled)
                for here, there in zip(self._here, lane.arrays, strict=True):
                    for row, block in enumerate(some):
                        np.copyto(here[block], there[row])

    def load(self, blocks: Items[int]) -> None:
        """Copy to the device, behind all that it was given so far. Returns when they are there."""
        with self._loading as lane:
            for some in _pieces(blocks, self._most):
                for here, there in zip(self._here, lane.arrays, strict=True):
                    for row, block in enumerate(some):
                        np.copyto(there[row], here[block])
                lane.scatter(some)


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


class StagedBlocks(Protocol):
    """A Staging, or those of several ranks as one (engine/parallel/joint.py)."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        ...

    def block(self, index: int) -> memoryview:
        """See Staging."""
        ...

    def save(self, blocks: Items[int]) -> None:
        """See Staging."""
        ...

    def load(self, blocks: Items[int]) -> None:
        """See Staging."""
        ...


def saving(executor: Executor, staging: StagedBlocks) -> Executor:
    """An Executor like `executor` whose results come when the blocks that their pass has finished
    are on the host, too: a prefill worker hands them over from there."""
    if isinstance(executor, Pipeline):
        return SavingPipeline(executor, staging)
    return SavingExecutor(executor, staging)


class SavingExecutor:
    """See `saving`."""

    def __init__(self, executor: Executor, staging: StagedBlocks) -> None:
        self._executor, self._staging = executor, staging

    @property
    def capacity(self) -> Capacity:
        """That of the executor."""
        return self._executor.capacity

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one pass, and save what it finished."""
        return self._saved(plan, self._executor.execute(plan))

    def close(self) -> None:
        """Close the executor."""
        self._executor.close()

    def _saved(self, plan: StepPlan, result: StepResult) -> StepResult:
        self._staging.save(finished_blocks(plan, self.capacity.block_size))
        return result


class SavingPipeline(SavingExecutor):
    """See `saving`; a Pipeline (engine/executor.py)."""

    def __init__(self, executor: Pipeline, staging: StagedBlocks) -> None:
        super().__init__(executor, staging)
        self._pipeline = executor

    def submit(self, plan: StepPlan) -> tuple[StepPlan, Any]:
        """Begin a pass."""
        return plan, self._pipeline.submit(plan)

    def ready(self, handle: tuple[StepPlan, Any]) -> bool:
        """Wait for the oldest pass, or `interrupt`."""
        return self._pipeline.ready(handle[1])

    def interrupt(self) -> None:
        """End the wait in `ready`."""
        self._pipeline.interrupt()

    def result(self, handle: tuple[StepPlan, Any]) -> StepResult:
        """The result of the oldest pass; what it finished is saved."""
        plan, begun = handle
        return self._saved(plan, self._pipeline.result(begun))


class Pulled(Protocol):
    """What this needs of a pull's report."""

    @property
    def on_device(self) -> bool:
        """Whether the blocks are in the device's pool already."""
        ...


Ref = TypeVar("Ref", contravariant=True)
Report = TypeVar("Report", bound=Pulled, covariant=True)


class Pulls(Protocol[Ref, Report]):
    """What this needs of a Consumer."""

    async def pull(self, ref: Ref, into: Items[int], skip: int = 0) -> Report:
        """Bring the blocks of `ref` after the first `skip` into the blocks `into`, of the host's
        memory or of the device."""
        ...


class StagedConsumer(Generic[Ref, Report]):
    """A Consumer (kv_transfer/contract.py) whose blocks are loaded into the device when they have
    come: `consumer` pulls into the staging, if not into the device."""

    def __init__(self, consumer: Pulls[Ref, Report], staging: StagedBlocks) -> None:
        self._consumer, self._staging = consumer, staging

    async def pull(self, ref: Ref, into: Items[int], skip: int = 0) -> Report:
        """As the consumer does; the KV is on the device when this returns."""
        report = await self._consumer.pull(ref, into, skip)
        if report.on_device:
            return report
        loading = asyncio.ensure_future(asyncio.to_thread(self._staging.load, into))
        try:
            await asyncio.shield(loading)
        except asyncio.CancelledError:
            await loading  # nothing may write into the blocks any more when this ends
            raise
        return report
