"""Pools on devices: host memory that is used as a device's, by kernels in Triton's interpreter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from engine.gpu.device_blocks import DeviceBlocks
from engine.gpu.kernels.launch import interpreted
from engine.gpu.shared_memory import HostMemory
from kv_transfer.store import BufferStore


def need_interpreter() -> None:
    """Skip the test where kernels are compiled: they would not run on host memory."""
    if not interpreted():
        pytest.skip("kernels run on the GPU here")


def make_device(store: BufferStore, save: Callable[[Sequence[int]], None]) -> DeviceBlocks:
    """The memory of `store` as a device's pool."""
    storage = torch.frombuffer(store.block(0).obj, dtype=torch.uint8)
    return DeviceBlocks(storage.view(store.blocks, -1), HostMemory(), save)


def kernels_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel at a time, since the interpreter keeps its state in a global, and few programs,
    each of which costs it milliseconds."""
    launch, lock = GridExecutor.__call__, threading.RLock()

    def launch_alone(self: Any, *arguments: Any, **options: Any) -> Any:
        with lock:
            return launch(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", launch_alone)
    sizes = {"BLOCK": 8192, "num_warps": 4}
    monkeypatch.setattr("engine.gpu.kernels.digest.tuned", lambda *problem: sizes)
