"""New keys and values on their way into the pool."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.kernels.kv_formats import as_stored, format_of, quantized, scale_views
from engine.gpu.kernels.launch import tuned


@triton.jit
def _store(
    k,  # [T, kv_heads, DIM]
    v,
    keys,  # [blocks, block_size, kv_heads, DIM]
    values,
    key_scales,  # [blocks, block_size, kv_heads], not for FLOAT
    value_scales,
    slots,  # [T]
    k_row,
    v_row,
    kv_block,
    kv_token,
    scale_block,
    scale_token,
    block_size,
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    FORMAT: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    block = slot // block_size
    offset = slot % block_size
    heads = tl.arange(0, HEADS_PADDED)
    dims = tl.arange(0, DIM_PADDED)
    held = (heads < HEADS)[:, None] & (dims < DIM)[None, :]
    lane = (heads * DIM)[:, None] + dims[None, :]
    to = block * kv_block + offset * kv_token + lane
    new_k = tl.load(k + token * k_row + lane, mask=held, other=0.0)
    new_v = tl.load(v + token * v_row + lane, mask=held, other=0.0)
    if FORMAT != 0:
        scaled_to = block * scale_block + offset * scale_token + heads
        new_k, key_scale = quantized(new_k.to(tl.float32), FORMAT)
        new_v, value_scale = quantized(new_v.to(tl.float32), FORMAT)
        tl.store(key_scales + scaled_to, key_scale, mask=heads < HEADS)
        tl.store(value_scales + scaled_to, value_scale, mask=heads < HEADS)
    tl.store(keys + to, new_k.to(keys.dtype.element_ty), mask=held)
    tl.store(values + to, new_v.to(values.dtype.element_ty), mask=held)


def store_kv(
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    slots: Tensor,
) -> None:
    """Put k, v [T, kv_heads, head_dim] into the pool at `slots` [T], block * block_size + offset,
    quantized as `Plane` does where `scales` are there. Heads of one token lie together; no two
    tokens share a slot."""
    tokens, heads, dim = k.shape
    block_size = keys.shape[1]
    for new in (k, v):
        assert new.shape == (tokens, heads, dim)
        assert new.stride()[1:] == (dim, 1)
    assert keys.stride() == values.stride()
    assert keys.stride()[2:] == (dim, 1)
    if not tokens:
        return
    key_scales, value_scales, scale_block, scale_token = scale_views(scales, keys)
    padded = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    default = {"num_warps": min(max(padded[0] * padded[1] // 512, 1), 8)}
    _store[(tokens,)](
        k,
        v,
        as_stored(keys),
        as_stored(values),
        key_scales,
        value_scales,
        slots,
        k.stride(0),
        v.stride(0),
        *keys.stride()[:2],
        scale_block,
        scale_token,
        block_size,
        HEADS=heads,
        HEADS_PADDED=padded[0],
        DIM=dim,
        DIM_PADDED=padded[1],
        FORMAT=format_of(keys),
        **tuned("kv_store", f"{heads}-{dim}", default, keys.device),
    )
