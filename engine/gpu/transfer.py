"""Small arrays on their way to and from the device, without anybody waiting for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.contract import Batch


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on `device`, in the order of its stream. The array may be changed afterwards.

    Page-locked memory comes from torch's cache, which hands it out again only when the copy from
    it is over.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """What this thread gives the device meanwhile goes to `stream`, if it is one.

    The device is made the current one first: torch's own context would leave a thread that has none
    with device 0, and there a context that takes memory."""
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


def batch_to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch, which lies in host memory, with its tensors on the device."""

    def moved(tensor: Tensor) -> Tensor:
        return to_device(tensor.numpy(), device)

    return replace(
        batch,
        token_ids=moved(batch.token_ids),
        positions=moved(batch.positions),
        slots=moved(batch.slots),
        block_tables=moved(batch.block_tables),
        logit_rows=moved(batch.logit_rows),
    )


class Stopwatch:
    """Seconds that the device takes for what it is given between the beginning and `stop`."""

    __slots__ = ("_begun", "_device", "_ended", "_seconds")

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = time.perf_counter()
        self._begun = self._ended = self._event()

    def stop(self) -> None:
        """The last of it has been given to the device."""
        self._ended = self._event()
        self._seconds = time.perf_counter() - self._seconds

    def seconds(self) -> float:
        """To be asked for when what it was given has given its results: the end is just behind."""
        if self._begun is None or self._ended is None:
            return self._seconds
        self._ended.synchronize()
        return float(self._begun.elapsed_time(self._ended)) / 1e3

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


class Arriving:
    """Numbers that the device is computing, on their way to the host."""

    __slots__ = ("_host", "_there")

    def __init__(self, numbers: Tensor) -> None:
        """Queue the copy of `numbers`, behind what computes them."""
        self._host = numbers
        self._there: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._there = torch.cuda.current_stream(numbers.device).record_event()

    def wait(self) -> Tensor:
        """The numbers in host memory, when they are there. Other threads run meanwhile."""
        if self._there is not None:
            self._there.synchronize()
        return self._host
