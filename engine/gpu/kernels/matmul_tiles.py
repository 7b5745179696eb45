"""The kernels of matmul.py. Weights are dequantized in registers, products summed in float32.

Four-bit weights lie in words of 32 bits, 16 words for a span of 128 inputs of one output: nibble j
of word i holds input 16 j + i. So a load of 16 bytes takes four words next to each other, nibble j
of them meets inputs next to each other, and nothing is shuffled. Groups of 16, 32 or 64 inputs are
whole nibbles of a span, larger ones whole spans.

A nibble becomes a float by two operations: moved to bits 16 to 19 of 0x43000000 it reads
128 + code.

Weights are the first operand of products, x transposed the second: the first may come from
registers on every GPU, so weights never go through shared memory as floats.
"""

from __future__ import annotations

import triton
import triton.language as tl

SPAN = 128  # inputs
LANES = 16  # words that hold them


@triton.jit
def _code(words, plane: tl.constexpr):
    """128 + the code in nibble `plane`, as float32."""
    moved = words << (16 - 4 * plane) if plane < 4 else words >> (4 * plane - 16)
    return ((moved & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def _byte(values, FP8: tl.constexpr):
    """Signed bytes, or e4m3 as bytes, as float32. fp8 by its bits: GPUs before sm_89 have none."""
    if FP8:
        bits = values.to(tl.int32)
        moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120, of the biases
    return values.to(tl.float32)


@triton.jit
def vector_int4(
    x,  # [in]
    words,  # [out, spans * 16] int32
    scales,  # [out, groups]
    zeros,  # [out, groups] uint8, where ZEROS
    bias,  # [out], where BIAS
    out,  # [out]; [splits, out] float32 where SPLIT
    outputs,
    inputs,
    spans,
    groups,
    share,  # spans of a split
    GROUP: tl.constexpr,  # inputs; 0 if there is one group
    RUNS: tl.constexpr,  # groups that a span has parts of
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,  # spans
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(row, outputs - 1).to(tl.int64)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, spans)
    lane = tl.arange(0, 16)
    PLANES: tl.constexpr = 8 // RUNS
    total = tl.zeros([BLOCK_N, BLOCK_S, 16], tl.float32)
    for first in range(begin, end, BLOCK_S):
        span = first + tl.arange(0, BLOCK_S)
        live = span < end
        there = row[:, None, None] * (spans * 16) + (span[:, None] * 16 + lane[None, :])[None]
        packed = tl.load(words + there, mask=live[None, :, None], other=0)
        for run in tl.static_range(RUNS):
            product = tl.zeros([BLOCK_N, BLOCK_S, 16], tl.float32)
            offset = tl.zeros([BLOCK_S, 16], tl.float32)
            for nth in tl.static_range(PLANES):
                column = span[:, None] * 128 + (run * PLANES + nth) * 16 + lane[None, :]
                inside = live[:, None] & (column < inputs)
                piece = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
                product += _code(packed, run * PLANES + nth) * piece[None]
                offset += piece
            group = span * 0 if GROUP == 0 else (span * 128 + run * PLANES * 16) // GROUP
            known = live & (group < groups)
            at = row[:, None] * groups + group[None, :]
            scale = tl.load(scales + at, mask=known[None, :], other=0.0).to(tl.float32)
            if ZEROS:
                zero = tl.load(zeros + at, mask=known[None, :], other=0).to(tl.float32) + 128.0
                total += scale[:, :, None] * (product - zero[:, :, None] * offset[None])
            else:
                total += scale[:, :, None] * (product - 136.0 * offset[None])
    result = tl.sum(tl.sum(total, axis=2), axis=1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SPLIT:
        tl.store(out + tl.program_id(1) * outputs + column, result, mask=column < outputs)
    else:
        if BIAS:
            result += tl.load(bias + row).to(tl.float32)
        tl.store(out + column, result.to(out.dtype.element_ty), mask=column < outputs)


@triton.jit
def vector_int8(
    x,  # [in]
    values,  # [out, in] int8; uint8, the bits of e4m3, where FP8
    scales,  # [out, groups]
    zeros,  # [out, groups] uint8, where ZEROS
    bias,  # [out], where BIAS
    out,  # [out]; [splits, out] float32 where SPLIT
    outputs,
    inputs,
    groups,
    share,  # inputs of a split
    GROUP: tl.constexpr,  # inputs, a multiple of BLOCK_K; 0 if there is one group
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(row, outputs - 1).to(tl.int64)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, inputs)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(begin, end, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        live = column < end
        loaded = tl.load(
            values + row[:, None] * inputs + column[None, :], mask=live[None, :], other=0
        )
        weight = _byte(loaded, FP8)
        piece = tl.load(x + column, mask=live, other=0.0).to(tl.float32)
        if GROUP == 0:
            if ZEROS:
                weight -= tl.load(zeros + row).to(tl.float32)[:, None] - 128.0
            total += weight * piece[None, :]
        else:
            at = row * groups + first // GROUP
            if ZEROS:
                weight -= tl.load(zeros + at).to(tl.float32)[:, None] - 128.0
            scale = tl.load(scales + at).to(tl.float32)
            total += weight * scale[:, None] * piece[None, :]
    result = tl.sum(total, axis=1)
    if GROUP == 0:
        result *= tl.load(scales + row).to(tl.float32)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SPLIT:
        tl.store(out + tl.program_id(1) * outputs + column, result, mask=column < outputs)
    else:
        if BIAS:
            result += tl.load(bias + row).to(tl.float32)
        tl.store(out + column, result.to(out.dtype.element_ty), mask=column < outputs)


@triton.jit
def _store(
    total,  # [BLOCK_N, BLOCK_M]
    bias,
    out,
    row,
    token,
    tokens,
    outputs,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write a tile, transposed: into `out` [T, out], or into a split's part of [splits, T, out]."""
    inside = (row < outputs)[:, None] & (token < tokens)[None, :]
    at = token.to(tl.int64)[None, :] * outputs + row[:, None]
    if SPLIT:
        at += tl.program_id(2).to(tl.int64) * tokens * outputs
        tl.store(out + at, total, mask=inside)
    else:
        if BIAS:
            added = tl.load(bias + row, mask=row < outputs, other=0.0).to(tl.float32)
            total += added[:, None]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def tiled_int4(
    x,  # [T, in]
    words,  # [out, spans * 16] int32
    scales,  # [out, groups]
    zeros,  # [out, groups] uint8, where ZEROS
    bias,  # [out], where BIAS
    out,  # [T, out]; [splits, T, out] float32 where SPLIT
    tokens,
    outputs,
    inputs,
    spans,
    groups,
    x_stride,
    share,  # spans of a split
    GROUP: tl.constexpr,  # inputs; 0 if there is one group
    RUNS: tl.constexpr,  # groups that a span has parts of
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,  # spans
):
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = tl.minimum(token, tokens - 1).to(tl.int64)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    output = tl.minimum(row, outputs - 1).to(tl.int64)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, spans)
    word = tl.arange(0, BLOCK_S * 16)
    PLANES: tl.constexpr = 8 // RUNS
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(begin, end, BLOCK_S):
        span = first + word // 16
        live = span < end
        there = output[:, None] * (spans * 16) + (first * 16 + word)[None, :]
        packed = tl.load(words + there, mask=live[None, :], other=0)
        for run in tl.static_range(RUNS):
            group = span * 0 if GROUP == 0 else (span * 128 + run * PLANES * 16) // GROUP
            scaled = live & (group < groups)
            at = output[:, None] * groups + group[None, :]
            scale = tl.load(scales + at, mask=scaled[None, :], other=0.0).to(tl.float32)
            zero = tl.full([BLOCK_N, BLOCK_S * 16], 136.0, tl.float32)
            if ZEROS:
                zero = tl.load(zeros + at, mask=scaled[None, :], other=0).to(tl.float32) + 128.0
            for nth in tl.static_range(PLANES):
                column = span * 128 + (run * PLANES + nth) * 16 + word % 16
                inside = live & (column < inputs)
                piece = tl.load(
                    x + known[None, :] * x_stride + column[:, None],
                    mask=inside[:, None],
                    other=0.0,
                )
                weight = ((_code(packed, run * PLANES + nth) - zero) * scale).to(x.dtype.element_ty)
                total = tl.dot(weight, piece, acc=total, input_precision="ieee")
    _store(total, bias, out, row, token, tokens, outputs, BIAS, SPLIT)


@triton.jit(do_not_specialize=["tokens"])
def tiled_int8(
    x,  # [T, in]
    values,  # [out, in] int8; uint8, the bits of e4m3, where FP8
    scales,  # [out, groups]
    zeros,  # [out, groups] uint8, where ZEROS
    bias,  # [out], where BIAS
    out,  # [T, out]; [splits, T, out] float32 where SPLIT
    tokens,
    outputs,
    inputs,
    groups,
    x_stride,
    share,  # inputs of a split
    GROUP: tl.constexpr,  # inputs, a multiple of BLOCK_K; 0 if there is one group
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = tl.minimum(token, tokens - 1).to(tl.int64)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    output = tl.minimum(row, outputs - 1).to(tl.int64)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, inputs)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(begin, end, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        live = column < end
        loaded = tl.load(
            values + output[:, None] * inputs + column[None, :], mask=live[None, :], other=0
        )
        piece = tl.load(
            x + known[None, :] * x_stride + column[:, None], mask=live[:, None], other=0.0
        )
        weight = _byte(loaded, FP8)
        if GROUP == 0:  # small integers and e4m3 are exact in x's format
            if ZEROS:
                weight -= tl.load(zeros + output).to(tl.float32)[:, None] - 128.0
        else:
            at = output * groups + first // GROUP
            if ZEROS:
                weight -= tl.load(zeros + at).to(tl.float32)[:, None] - 128.0
            weight *= tl.load(scales + at).to(tl.float32)[:, None]
        rounded = weight.to(x.dtype.element_ty)
        total = tl.dot(rounded, piece, acc=total, input_precision="ieee")
    if GROUP == 0:
        total *= tl.load(scales + output).to(tl.float32)[:, None]
    _store(total, bias, out, row, token, tokens, outputs, BIAS, SPLIT)


@triton.jit(do_not_specialize=["count"])
def add_splits(
    parts,  # [splits, count] float32
    bias,  # [outputs], where BIAS
    out,  # [count]
    count,
    outputs,
    splits,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parts of a sum in their order, so that it is the same every time."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros([BLOCK], tl.float32)
    where = parts + at
    for _ in range(splits):
        total += tl.load(where, mask=inside, other=0.0)
        where += count
    if BIAS:
        total += tl.load(bias + at % outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def quantize_rows(
    x,  # [T, in]
    values,  # [T, in] float8_e4m3fn
    scales,  # [T] float32
    inputs,
    x_stride,
    BLOCK: tl.constexpr,
):
    """Each row to the scale that makes its largest number 448."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, inputs, BLOCK):
        column = first + tl.arange(0, BLOCK)
        found = tl.load(x + row * x_stride + column, mask=column < inputs, other=0.0)
        largest = tl.maximum(largest, tl.abs(found.to(tl.float32)))
    most = tl.max(largest, axis=0)
    scale = tl.where(most > 0.0, most / 448.0, 1.0)
    tl.store(scales + row, scale)
    for first in range(0, inputs, BLOCK):
        column = first + tl.arange(0, BLOCK)
        found = tl.load(x + row * x_stride + column, mask=column < inputs, other=0.0)
        scaled = tl.clamp(found.to(tl.float32) / scale, -448.0, 448.0)
        tl.store(values + row * inputs + column, scaled.to(tl.float8e4nv), mask=column < inputs)
