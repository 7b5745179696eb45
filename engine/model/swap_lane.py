"""One direction of swapping: a queue, a thread that empties it, and on a GPU a stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from itertools import islice
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK_BYTES = 4 * 2**20  # copied between two looks at the clock

Pair = tuple[Tensor, Tensor]
"""A block to read and the block to write, both contiguous."""

OnEnd = Callable[[int, Exception | None], None]
"""Called by the lane's thread with the number of a job and what went wrong, if anything."""


class SwapLane:
    """Copies jobs of blocks one after another, at a limited speed."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        *,
        block_bytes: int,
        bandwidth: float,
        on_end: OnEnd,
    ) -> None:
        """`bandwidth` in bytes per second, 0 for no limit. The thread starts with the first job."""
        self._name = name
        self._device = device
        self._chunk = max(1, _CHUNK_BYTES // block_bytes)  # blocks
        self._seconds_per_block = block_bytes / bandwidth if bandwidth else 0.0
        self._on_end = on_end
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def put(self, number: int, pairs: Iterable[Pair]) -> None:
        """Queue a job. It begins after what the caller has asked of the device so far. `pairs` is
        iterated by the lane's thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put((number, iter(pairs), _event(self._device)))

    def close(self) -> None:
        """Give up what is queued and end the thread. Idempotent."""
        self._closing.set()
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        copy = _copier(self._device)
        idle_at = 0.0  # when the bytes so far would have passed at full speed
        while (job := self._jobs.get()) is not None:
            number, pairs, ready = job
            try:
                while chunk := list(islice(pairs, self._chunk)):
                    begun = time.perf_counter()
                    copy(chunk, ready)
                    idle_at = max(begun, idle_at) + len(chunk) * self._seconds_per_block
                    if self._closing.wait(max(0.0, idle_at - time.perf_counter())):
                        return
            except Exception as error:
                self._on_end(number, error)
            else:
                self._on_end(number, None)


_Job = tuple[int, Iterator[Pair], torch.cuda.Event | None]
_Copier = Callable[[Items[Pair], torch.cuda.Event | None], None]
"""Copies blocks after the event; returns when their bytes are there."""


def _event(device: torch.device) -> torch.cuda.Event | None:
    """Stands for all work that this thread has given to the device."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def _copier(device: torch.device) -> _Copier:
    return _on_stream_of(device) if device.type == "cuda" else _in_memory


def _on_stream_of(device: torch.device) -> _Copier:
    torch.cuda.set_device(device)  # of this thread; else it would come to have a context on GPU 0
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(pairs: Items[Pair], ready: torch.cuda.Event | None) -> None:
        if ready is not None:
            stream.wait_event(ready)
        with torch.cuda.stream(stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            done = stream.record_event()  # after the copies: what is waited for is their end
        done.synchronize()

    return copy


def _in_memory(pairs: Items[Pair], ready: torch.cuda.Event | None) -> None:
    """With numpy: torch would start a second team of threads beside the one that computes."""
    for source, target in pairs:
        np.copyto(_bytes(target), _bytes(source))


def _bytes(block: Tensor) -> NDArray[np.uint8]:
    view: NDArray[np.uint8] = block.view(-1).view(torch.uint8).numpy()
    return view
