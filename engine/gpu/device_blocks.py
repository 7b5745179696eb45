"""The KV pool of a device as workers of the same host see it: blocks that go from device to device.

What kv_transfer/device.py asks of a producer's pool and of a consumer's. Copies and digests go
beside the passes, on streams of their own, and wait for no pass. So it is the callers' business
that nobody writes to the blocks meanwhile: a producer names those whose pass is over
(SettledExecutor), a consumer those that the passes so far have done with (SettledConsumer).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from typing import Generic

import numpy as np
import torch
from torch import Tensor

from engine.executor import Executor
from engine.gpu.kernels.digest import digests, transfer
from engine.gpu.shared_memory import Opened, SharedMemory
from engine.gpu.transfer import on, to_device
from engine.staged import Pulls, Ref, Report
from scheduling.plan import Capacity, StepPlan, StepResult


class DeviceBlocks:
    """A SourcePool and a TargetPool (kv_transfer/device.py) over one device's pool."""

    def __init__(
        self, storage: Tensor, memory: SharedMemory, save: Callable[[Items[int]], None]
    ) -> None:
        """`storage`: [blocks, ...], contiguous. `save` brings blocks into host memory."""
        self._save = save
        self._saved: set[int] = set()  # in host memory as they are
        self._storage = storage
        self._memory = memory
        self._side = _Side(storage.device)
        self.where = storage.device
        self.handle = b""  # what others open; none before `export`

    def export(self) -> None:
        """Let others open the pool. Raises OSError if the memory cannot be shared."""
        self.handle = self._memory.export(self._storage)

    def digests(self, blocks: Items[int], first: int) -> list[int]:
        """64 bits for each block; see engine/gpu/kernels/digest.py."""
        with self._side.alone():
            return _unsigned(digests(self._storage, _numbers(blocks, self._storage), first))

    def save(self, blocks: Items[int]) -> None:
        """Bring blocks into host memory, unless they are there: a prefix has many leases."""
        missing = [block for block in blocks if block not in self._saved]
        self._save(missing)
        self._saved.update(missing)

    def rewritten(self, blocks: Items[int]) -> None:
        """These get other contents, and are under no lease."""
        self._saved.difference_update(blocks)

    def open(self, handle: bytes, blocks: int) -> OpenedBlocks:
        """A producer's pool of `blocks` blocks as large as these, of which one has been read.
        Raises OSError and ValueError."""
        size = self._storage[0].numel() * self._storage.element_size()
        try:
            opened = OpenedBlocks(self._memory.open(handle, blocks * size), blocks, self._storage)
            opened.try_reading()
        except RuntimeError as error:  # of torch or Triton
            raise OSError(f"memory that kernels cannot read: {error}") from error
        return opened

    def warm_up(self) -> None:
        """Have the kernels compiled before the first request."""
        with self._side.alone():
            number, scratch = _numbers([0], self._storage), torch.empty_like(self._storage[:1])
            transfer(self._storage, number, scratch, number, 0)
            digests(self._storage, number, 0)


class OpenedBlocks:
    """A producer's blocks (kv_transfer/device.py: OpenedPool), to be copied into one's own."""

    def __init__(self, opened: Opened, blocks: int, target: Tensor) -> None:
        self._close = opened.close
        self._source = opened.memory.view(blocks, -1)
        self._target = target
        self._side = _Side(target.device)

    def try_reading(self) -> None:
        """Raise what a copy would, rather now than in every pull; then the pool is closed."""
        try:
            with self._side.alone():
                digests(self._source, _numbers([0], self._target), 0)
        except BaseException:
            self.close()
            raise

    def copy(self, sources: Items[int], into: Items[int], first: int) -> list[int]:
        """Copy blocks into one's own; returns the digests of what came, when it is there."""
        if not all(0 <= block < len(self._source) for block in sources):
            raise ValueError("a block outside the producer's pool")
        with self._side.alone():
            numbers = _numbers([*sources, *into], self._target)  # one crossing of the bus for both
            there, here = numbers[: len(sources)], numbers[len(sources) :]
            return _unsigned(transfer(self._source, there, self._target, here, first))

    def close(self) -> None:
        """Let go of the producer's memory."""
        self._source = torch.empty(0, dtype=torch.uint8)
        self._close()


class _Side:
    """A stream beside the passes, for one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Give the device work that is over when this ends, whatever ends it."""
        with self._lock:
            try:
                with on(self._stream):
                    yield
            finally:
                if self._stream is not None:
                    self._stream.synchronize()


class SettledExecutor:
    """An Executor whose results come when the device has done all that their pass is: what it
    wrote may be read on any stream. `blocks` are told what passes write to."""

    def __init__(self, executor: Executor, blocks: DeviceBlocks) -> None:
        self._executor, self._blocks = executor, blocks

    @property
    def capacity(self) -> Capacity:
        """That of the executor."""
        return self._executor.capacity

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one pass to its end."""
        size, device = self.capacity.block_size, self._blocks.where
        for chunk in plan.chunks:
            until = -(-(chunk.start + chunk.length) // size)
            self._blocks.rewritten(chunk.sequence.blocks[chunk.start // size : until])
        result = self._executor.execute(plan)
        if device.type == "cuda":
            torch.cuda.default_stream(device).synchronize()
        return result

    def close(self) -> None:
        """Close the executor."""
        self._executor.close()


class SettledConsumer(Generic[Ref, Report]):
    """A Consumer (kv_transfer/contract.py) that pulls when the passes so far are over: one of them
    may have been a guess that writes into what has become free since."""

    def __init__(self, consumer: Pulls[Ref, Report], device: torch.device) -> None:
        self._consumer, self._device = consumer, device

    async def pull(self, ref: Ref, into: Items[int], skip: int = 0) -> Report:
        """As the consumer does."""
        if self._device.type == "cuda":
            passes = torch.cuda.default_stream(self._device).record_event()
            await asyncio.to_thread(passes.synchronize)
        return await self._consumer.pull(ref, into, skip)


def _numbers(blocks: Items[int], near: Tensor) -> Tensor:
    return to_device(np.array(blocks, dtype=np.int64), near.device)


def _unsigned(sums: Tensor) -> list[int]:
    return [value % 2**64 for value in sums.tolist()]
