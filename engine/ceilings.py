"""What this machine's processor can do at most: bytes read and operations per second, measured.

Other processes share the machine: every window here is short, and the fast ones count. Nobody
reaches a ceiling that others are using up meanwhile, so measure beside what is to be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16", "int8"]

_WINDOW = 8 * 2**20  # bytes of one timed read: under a time slice, well over what a call costs
_PASSES = 3
_FAST = 0.1  # share of the windows of a read that are at least as fast as what is reported
_SHAPES = ((512, 1024, 1024), (512, 3072, 1024), (1024, 2048, 2048))  # rows, outputs, inputs
_SECONDS = 0.3  # spent on one shape of a product, at least three of them


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Per second, with `threads` threads. A multiply-add counts as two operations."""

    threads: int
    working_set: int  # bytes that `read_bandwidth` was measured over
    read_bandwidth: float  # bytes
    fp32_flops: float
    bf16_flops: float
    int8_ops: float

    def operations(self, precision: Precision) -> float:
        """Operations per second of matrix products in `precision`."""
        return {"fp32": self.fp32_flops, "bf16": self.bf16_flops, "int8": self.int8_ops}[precision]

    def or_better(self, other: Ceilings) -> Ceilings:
        """The better of two measurements in every field: whatever slowed one down may have spared
        the other. Both must be of the same threads and working set."""
        assert (self.threads, self.working_set) == (other.threads, other.working_set)
        return Ceilings(
            threads=self.threads,
            working_set=self.working_set,
            read_bandwidth=max(self.read_bandwidth, other.read_bandwidth),
            fp32_flops=max(self.fp32_flops, other.fp32_flops),
            bf16_flops=max(self.bf16_flops, other.bf16_flops),
            int8_ops=max(self.int8_ops, other.int8_ops),
        )

    def floor(self, *, read_bytes: float, operations: float, precision: Precision) -> float:
        """Seconds that a step takes at least: reading and computing overlap perfectly (the
        roofline)."""
        return max(read_bytes / self.read_bandwidth, operations / self.operations(precision))


def measure(threads: int, *, working_set: int = 2**30) -> Ceilings:
    """Takes some seconds. torch runs with `threads` threads meanwhile.

    `working_set` is the memory that reads go round in: what one step of a model reads, to count
    the caches in where they hold a part of it; the default is more than most caches hold.
    Bandwidth is the best of several ways to read. Products are torch's (oneDNN, MKL), bfloat16
    also with weights packed ahead.
    """
    with _threads(threads):
        return Ceilings(
            threads=threads,
            working_set=working_set,
            read_bandwidth=_read_bandwidth(working_set),
            fp32_flops=max(_speed(_fp32, shape) for shape in _SHAPES),
            bf16_flops=max(_speed(kind, shape) for kind in (_bf16, _packed) for shape in _SHAPES),
            int8_ops=max(_speed(_int8, shape) for shape in _SHAPES),
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


# -- Memory --------------------------------------------------------------------------------


def _read_bandwidth(working_set: int) -> float:
    count = max(1, working_set // _WINDOW)
    windows = tuple(torch.ones(count, _WINDOW // 4))
    reads: tuple[Callable[[Tensor], object], ...] = (
        lambda part: part.dot(part),
        lambda part: part.view(torch.int32).max(),
    )
    return max(_WINDOW / _fast_read(read, windows) for read in reads)


def _fast_read(read: Callable[[Tensor], object], windows: tuple[Tensor, ...]) -> float:
    """Seconds that the fast windows take."""
    rounds = max(_PASSES, -(-32 // len(windows)))
    found = sorted(_seconds(partial(read, part)) for _ in range(rounds) for part in windows)
    return found[int(_FAST * len(found))]


# -- Products: each returns a call that multiplies [rows, inputs] by [inputs, outputs] -----


def _speed(
    product: Callable[[int, int, int], Callable[[], object]], shape: tuple[int, int, int]
) -> float:
    """Operations per second of the best window."""
    rows, outputs, inputs = shape
    call = product(rows, outputs, inputs)
    call()  # what the libraries compile and pack on the first call
    best, spent, runs = float("inf"), 0.0, 0
    while spent < _SECONDS or runs < 3:
        seconds = _seconds(call)
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return 2 * rows * outputs * inputs / best


def _fp32(rows: int, outputs: int, inputs: int) -> Callable[[], object]:
    left, right = torch.rand(rows, inputs), torch.rand(outputs, inputs)
    return lambda: torch.nn.functional.linear(left, right)


def _bf16(rows: int, outputs: int, inputs: int) -> Callable[[], object]:
    left, right = torch.rand(rows, inputs).bfloat16(), torch.rand(outputs, inputs).bfloat16()
    return lambda: torch.nn.functional.linear(left, right)


def _packed(rows: int, outputs: int, inputs: int) -> Callable[[], object]:
    """Weights in the order that oneDNN likes best, where it knows one."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return _bf16(rows, outputs, inputs)
    left, right = torch.rand(rows, inputs).bfloat16(), torch.rand(outputs, inputs).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(right, rows)
    return lambda: torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")


def _int8(rows: int, outputs: int, inputs: int) -> Callable[[], object]:
    left = torch.randint(-127, 128, (rows, inputs), dtype=torch.int8)
    right = torch.randint(-127, 128, (inputs, outputs), dtype=torch.int8)
    return lambda: torch._int_mm(left, right)
