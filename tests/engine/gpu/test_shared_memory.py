"""Which GPU's memory is opened, and which not; the driver itself only a GPU can show
(test_device_blocks.py)."""

from __future__ import annotations

import pytest
import torch

from engine.gpu import shared_memory
from engine.gpu.shared_memory import CudaMemory

_BASE = 2**32


class Driver:
    """Allocations of a mebibyte, at every multiple of 4 GiB."""

    opened: list[bytes]

    def __init__(self, device: torch.device) -> None:
        self.opened = []

    def handle_of(self, address: int) -> tuple[int, bytes]:
        return address // _BASE * _BASE, bytes([9]) * 64

    def open(self, handle: bytes) -> int:
        self.opened.append(handle)
        raise OSError("opened")


class Memory:
    """A tensor on a GPU."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size

    def data_ptr(self) -> int:
        return self.address

    def numel(self) -> int:
        return self.size // 2

    def element_size(self) -> int:
        return 2


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[CudaMemory]:
    """Three, of which the last has no access to the others."""
    monkeypatch.setattr(shared_memory, "_Driver", Driver)
    monkeypatch.setattr(shared_memory, "_uuid", lambda index: f"GPU-{index}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: own != 2)
    return [CudaMemory(torch.device("cuda", index)) for index in range(3)]


def _export(gpu: CudaMemory) -> bytes:
    return gpu.export(Memory(3 * _BASE + 512, 4096))  # type: ignore[arg-type]


def test_its_own_memory_and_that_of_a_gpu_within_reach_are_opened(gpus: list[CudaMemory]) -> None:
    for handle in (_export(gpus[0]), _export(gpus[1])):
        with pytest.raises(OSError, match="opened"):
            gpus[0].open(handle, 4096)
    assert gpus[0]._driver.opened == [bytes([9]) * 64] * 2  # type: ignore[attr-defined]


def test_memory_out_of_reach_or_of_a_gpu_that_is_not_seen_is_refused(
    gpus: list[CudaMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="GPU 2 has no access to the memory of GPU 0"):
        gpus[2].open(_export(gpus[0]), 4096)
    handle = _export(gpus[2])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(OSError, match="GPU GPU-2"):
        gpus[0].open(handle, 4096)
    assert not gpus[0]._driver.opened  # type: ignore[attr-defined]


def test_less_memory_than_announced_is_refused(gpus: list[CudaMemory]) -> None:
    with pytest.raises(ValueError, match="4096 bytes of memory where 4097 were announced"):
        gpus[0].open(_export(gpus[0]), 4097)
