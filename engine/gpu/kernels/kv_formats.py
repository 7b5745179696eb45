"""Number formats of the KV pool, as kernels read and write them.

Floats are what they seem. int8 and float8 (e4m3fn) have a scale per token and head
(engine/attention/plane.py): readers multiply scores and probabilities by it, one number per token,
not keys and values. Kernels see float8 as bytes; GPUs without conversions for it (before sm_89),
and the interpreter, move its bits into a float16 that is `unit` times too small.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.kernels.launch import architecture

FLOAT = 0
INT8 = 1
FLOAT8_BITS = 2
FLOAT8 = 3

_INT8: tl.constexpr = tl.constexpr(INT8)
_FLOAT8_BITS: tl.constexpr = tl.constexpr(FLOAT8_BITS)
_FLOAT8: tl.constexpr = tl.constexpr(FLOAT8)
_ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it becomes whole


def format_of(numbers: Tensor) -> int:
    """The format of the pool's numbers on the device they are to be read on."""
    if numbers.dtype is torch.int8:
        return INT8
    if numbers.dtype is torch.float8_e4m3fn:
        return FLOAT8 if architecture() >= 89 else FLOAT8_BITS
    return FLOAT


def as_stored(numbers: Tensor) -> Tensor:
    """What kernels take for the pool's numbers: float8 as bytes, others as they are."""
    return numbers.view(torch.uint8) if numbers.dtype is torch.float8_e4m3fn else numbers


def scale_views(
    scales: tuple[Tensor, Tensor] | None, keys: Tensor
) -> tuple[Tensor, Tensor, int, int]:
    """Scales of keys and values, and their strides over blocks and tokens; where there are none,
    something that kernels do not look at."""
    if scales is None:
        return keys, keys, 0, 0
    k, v = scales
    assert k.dtype is v.dtype is torch.float32
    assert k.stride() == v.stride()
    assert k.stride(2) == 1
    return k, v, k.stride(0), k.stride(1)


@triton.jit
def widened(numbers, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """Stored numbers as `dtype`, without their scales; `unit` times too small."""
    if FORMAT == _FLOAT8_BITS:
        bits = numbers.to(tl.uint16)
        halves = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        wide = halves.to(tl.float16, bitcast=True).to(dtype)
    elif FORMAT == _FLOAT8:
        wide = numbers.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:
        wide = numbers.to(dtype)
    return wide


@triton.jit
def unit(FORMAT: tl.constexpr):
    """What `widened` leaves to be multiplied by: the exponents' biases differ by 8."""
    return 256.0 if FORMAT == _FLOAT8_BITS else 1.0


@triton.jit
def quantized(x, FORMAT: tl.constexpr):
    """Rows of `x` [R, N] float32 as numbers of an INT8 or float8 format and scales [R], as
    `plane.quantize` makes them; float8 as bytes."""
    LARGEST: tl.constexpr = 127.0 if FORMAT == _INT8 else 448.0
    largest = tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=1)
    usable = (largest > 1e-30) & (largest < float("inf"))
    most = tl.full(largest.shape, LARGEST, tl.float32)
    inverse = tl.where(usable, tl.div_rn(most, tl.where(usable, largest, 1.0)), 0.0)
    scales = tl.where(usable, tl.div_rn(largest, most), 0.0)
    scaled = tl.where(usable[:, None], x, 0.0) * inverse[:, None]
    if FORMAT == _INT8:  # noqa: SIM108
        numbers = ((scaled + _ROUND) - _ROUND).to(tl.int8)
    else:
        numbers = float8_bits(scaled)
    return numbers, scales


@triton.jit
def float8_bits(x):
    """`x`, float32 of at most 448 or hardly more, as the bits of e4m3fn: nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    tiny = ((size * 512.0 + _ROUND) - _ROUND).to(tl.uint32)  # steps of 2^-9 below 2^-6
    return (sign | tl.where(size < 0.015625, tiny, normal)).to(tl.uint8)
