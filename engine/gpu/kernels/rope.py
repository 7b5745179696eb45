"""What lies between the QKV product and attention, in one pass over its rows: norms of queries and
keys, their rotation, and keys and values on their way into the paged pool."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.kernels.kv_formats import as_stored, float8_bits
from engine.gpu.kernels.launch import tuned

# What the largest number of a token and head becomes in a scaled pool; as in Plane.
_LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}


@triton.jit
def _halves(here, keep, HALF: tl.constexpr):
    """Both halves of heads, float32."""
    low = tl.load(here, mask=keep, other=0.0).to(tl.float32)
    high = tl.load(here + HALF, mask=keep, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _turned(low, high, rotation, weight, columns, eps, HALF: tl.constexpr):
    """Heads [n, HALF] times 2, normalized if there is a weight, each pair turned by its angle."""
    inside = columns < HALF
    if weight is not None:
        squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        low *= scale * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        weights = tl.load(weight + HALF + columns, mask=inside, other=0.0).to(tl.float32)
        high *= scale * weights[None, :]
    cos = tl.load(rotation + columns, mask=inside, other=0.0)[None, :]
    sin = tl.load(rotation + HALF + columns, mask=inside, other=0.0)[None, :]
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _largest(x):
    """The largest magnitude of each row; infinite where something is not a number."""
    return tl.max(tl.where(x == x, tl.abs(x), float("inf")), axis=1)


@triton.jit
def _scaled(x, inverse, LARGEST: tl.constexpr):
    """x * inverse, for int8 in whole numbers, ties to even; 0 where inverse is."""
    scaled = tl.where(inverse > 0, x, 0.0) * inverse
    if LARGEST == 127:
        scaled = (scaled + 12582912.0) - 12582912.0  # 1.5 * 2**23 leaves no digits after the point
    return scaled


@triton.jit
def _put(low, high, there, scales, keep, each, LARGEST: tl.constexpr, HALF: tl.constexpr):
    """Store heads, quantized where LARGEST is not 0, with a scale for each."""
    if LARGEST > 0:
        largest = tl.maximum(_largest(low), _largest(high))
        some = (largest > 1e-30) & (largest < float("inf"))
        largest = tl.where(some, largest, 1.0)
        most = tl.full(largest.shape, LARGEST, tl.float32)
        inverse = tl.where(some, tl.div_rn(most, largest), 0.0)
        tl.store(scales, tl.where(some, tl.div_rn(largest, most), 0.0), mask=each)
        low, high = (
            _scaled(low, inverse[:, None], LARGEST),
            _scaled(high, inverse[:, None], LARGEST),
        )
    if LARGEST == 448:  # as bytes: GPUs before sm_89 know no others
        tl.store(there, float8_bits(low), mask=keep)
        tl.store(there + HALF, float8_bits(high), mask=keep)
    else:
        tl.store(there, low.to(there.dtype.element_ty), mask=keep)
        tl.store(there + HALF, high.to(there.dtype.element_ty), mask=keep)


@triton.jit
def _rotate_and_store(
    qkv,  # [T, (HEADS + 2 * KV_HEADS) * 2 * HALF]
    rotations,  # [P, 2 * HALF] float32: cosines, then sines
    rotation_rows,  # [T]
    slots,  # [T]; negative: nowhere
    keys,  # [blocks, BLOCK_SIZE, KV_HEADS, 2 * HALF], by strides
    values,
    key_scales,  # [blocks, BLOCK_SIZE, KV_HEADS] float32, by strides; unused if LARGEST is 0
    value_scales,
    q_norm,  # [2 * HALF] or None
    k_norm,
    out,  # [T, HEADS, 2 * HALF]
    token_stride,
    block_stride,
    position_stride,
    scale_block_stride,
    scale_position_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # of a head
    BLOCK_SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    GROUP: tl.constexpr,  # heads of a program, a power of two
    PADDED: tl.constexpr,  # the power of two from HALF
):
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    k_parts: tl.constexpr = (KV_HEADS + GROUP - 1) // GROUP
    columns = tl.arange(0, PADDED)
    rotation = rotations + tl.load(rotation_rows + token).to(tl.int64) * (2 * HALF)
    here = qkv + token * token_stride

    if part < q_parts:
        head = part * GROUP + tl.arange(0, GROUP)
        keep = (head < HEADS)[:, None] & (columns < HALF)[None, :]
        at = head[:, None] * (2 * HALF) + columns[None, :]
        low, high = _halves(here + at, keep, HALF)
        low, high = _turned(low, high, rotation, q_norm, columns, eps, HALF)
        to = out + token * (HEADS * 2 * HALF) + at
        _put(low, high, to, out, keep, keep, 0, HALF)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        block, position = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        head = (part - q_parts) % k_parts * GROUP + tl.arange(0, GROUP)
        each = head < tl.where(slot < 0, 0, KV_HEADS)
        keep = each[:, None] & (columns < HALF)[None, :]
        at = head[:, None] * (2 * HALF) + columns[None, :]
        where = block * block_stride + position * position_stride + at
        scale = block * scale_block_stride + position * scale_position_stride + head
        if part < q_parts + k_parts:
            low, high = _halves(here + HEADS * 2 * HALF + at, keep, HALF)
            low, high = _turned(low, high, rotation, k_norm, columns, eps, HALF)
            # To the model's format first: that is what attention would get where KV is not scaled.
            low = low.to(qkv.dtype.element_ty).to(tl.float32)
            high = high.to(qkv.dtype.element_ty).to(tl.float32)
            _put(low, high, keys + where, key_scales + scale, keep, each, LARGEST, HALF)
        else:
            low, high = _halves(here + (HEADS + KV_HEADS) * 2 * HALF + at, keep, HALF)
            _put(low, high, values + where, value_scales + scale, keep, each, LARGEST, HALF)


def rotate_and_store(
    qkv: Tensor,
    rotations: Tensor,
    rotation_rows: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    *,
    heads: int,
    kv_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys, and write keys and values into one layer of the paged pool.

    qkv [T, (heads + 2 * kv_heads) * head_dim], rows of its own stride. rotations [P, head_dim]
    float32, a row for each rotation: cosines, then sines (Rope.table, Rope.rotations);
    rotation_rows [T] says which is each token's. slots [T]: block * block_size + offset; a token
    whose slot is -1 fills up a batch and is not written. keys, values [blocks, block_size,
    kv_heads, head_dim], views of a pool; scales [blocks, block_size, kv_heads] of both beside int8
    and float8, in which numbers are quantized as by Plane. q_norm, k_norm [head_dim]: weights of
    an RMS norm over each head, before the rotation (Qwen3).

    Returns the queries, [T, heads, head_dim] in qkv's format. Computed in float32.
    """
    tokens = len(qkv)
    _, block_size, _, head_dim = keys.shape
    assert keys.shape == values.shape
    assert keys.stride() == values.stride()
    assert keys.stride()[2:] == (head_dim, 1)
    assert qkv.shape == (tokens, (heads + 2 * kv_heads) * head_dim)
    assert qkv.stride(1) == 1
    assert rotations.shape[1] == head_dim
    assert rotations.is_contiguous()
    assert (scales is not None) == (keys.dtype in _LARGEST)
    assert (q_norm is None) == (k_norm is None)
    if out is None:
        out = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    assert out.shape == (tokens, heads, head_dim)
    assert out.is_contiguous()
    if not tokens:
        return out
    key_scales, value_scales = scales or (rotations[None], rotations[None])
    assert key_scales.stride(2) == 1
    padded = triton.next_power_of_2(head_dim // 2)
    group = min(triton.next_power_of_2(kv_heads), 8)
    default = {"GROUP": group, "num_warps": max(1, group * padded // 256)}  # 16 bytes a thread
    chosen = tuned("rotate_and_store", f"{heads}/{kv_heads}x{head_dim}", default, qkv.device)
    parts = triton.cdiv(heads, chosen["GROUP"]) + 2 * triton.cdiv(kv_heads, chosen["GROUP"])
    _rotate_and_store[(tokens, parts)](
        qkv,
        rotations,
        rotation_rows,
        slots,
        as_stored(keys),
        as_stored(values),
        key_scales,
        value_scales,
        q_norm,
        k_norm,
        out,
        qkv.stride(0),
        keys.stride(0),
        keys.stride(1),
        key_scales.stride(0),
        key_scales.stride(1),
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        BLOCK_SIZE=block_size,
        LARGEST=_LARGEST.get(keys.dtype, 0),
        PADDED=padded,
        **chosen,
    )
    return out
