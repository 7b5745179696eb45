"""What the device can do at most, measured beside what is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu.timing import seconds

_BYTES = 2**30  # of one copy, far more than any cache
_SIDE = 8192  # of a square product


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Per second. A multiply-add counts as two operations."""

    read: float  # bytes that a sum reads, or a copy reads and writes, whichever is more
    bf16: float  # operations of torch's products
    fp8: float  # 0 where the device has none

    def floor(self, moved: float, operations: float) -> float:
        """Seconds that a pass takes at least: moving and computing overlap perfectly."""
        return max(moved / self.read, operations / self.bf16)


def measure(device: torch.device, *, size: int = _BYTES, side: int = _SIDE) -> Ceilings:
    """Takes a second on a GPU. Numbers are random: products of zeros are faster."""
    return Ceilings(_bandwidth(device, size), _bf16(device, side), _fp8(device, side))


def _bandwidth(device: torch.device, size: int) -> float:
    source = torch.rand(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / seconds(lambda: target.copy_(source), device)
    return max(copied, size / seconds(lambda: source.sum(), device))


def _bf16(device: torch.device, side: int) -> float:
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return 2 * side**3 / seconds(lambda: left @ right, device)


def _fp8(device: torch.device, side: int) -> float:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return 0.0
    left, right = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    call = lambda: torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
    return 2 * side**3 / seconds(call, device)
