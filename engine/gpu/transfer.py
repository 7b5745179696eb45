"""Small arrays on their way to and from the device, without anybody waiting for them."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on `device`, in the order of its stream. The array may be changed afterwards.

    Page-locked memory comes from torch's cache, which hands it out again only when the copy from
    it is over.
    """
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)


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
