"""The random numbers of engine/model/philox.py, where a kernel needs them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gumbel(seed, stream, position, indices):
    """Standard Gumbel noise, float64: of row `uniforms(seed, stream, position)` the numbers at
    `indices` (a tensor of int32).

    Every number costs four, of which three are thrown away. There are few.
    """
    lane = indices // 4
    zero = lane * 0
    counter = (zero + stream.to(tl.int32), zero + position.to(tl.int32))
    first, second, third, fourth = tl.philox(seed, lane, counter[0], counter[1], zero)
    word = tl.where(indices % 2 == 0, first, second)
    word = tl.where(indices % 4 < 2, word, tl.where(indices % 2 == 0, third, fourth))
    point = (word.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)
    return -tl.log(-tl.log(point))
