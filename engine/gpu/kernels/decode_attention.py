"""Attention of single tokens over their paged contexts: flash-decoding.

A program takes one sequence, one key head and one part of the context, for all query heads that
share the key head, so that every key and value is read once. The parts are then joined by a second
kernel (Dao et al., "Flash-Decoding for long-context inference", 2023).

How a context is cut depends on its own length and on the shape of the model, never on the rest of
the batch: a sequence gets the same bits alone and among others, in a CUDA graph of any bucket.
The bound on contexts only says how many programs are launched; those of parts that a context does
not have return at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.kernels.kv_formats import as_stored, format_of, scale_views, unit, widened
from engine.gpu.kernels.launch import tuned

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _span(context, WINDOW: tl.constexpr, TILE: tl.constexpr, SHORTEST: tl.constexpr, PARTS):
    """Where the part of the context that is seen begins, a multiple of TILE, and how many tokens a
    part has: SHORTEST, or so many that PARTS are enough."""
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context - WINDOW, 0) // TILE * TILE
    length = tl.cdiv(tl.cdiv(context - begin, PARTS), TILE) * TILE
    return begin, tl.maximum(length, SHORTEST)


@triton.jit(do_not_specialize=["table_stride"])
def _attend(
    q,  # [T, heads, DIM]
    keys,  # [blocks, BLOCK_SIZE, kv_heads, DIM]
    values,
    key_scales,  # [blocks, BLOCK_SIZE, kv_heads], not for FLOAT
    value_scales,
    tables,  # [S, B]
    contexts,  # [S]
    members,  # [N] sequences, where CHOSEN
    rows,  # [S] rows of q, where CHOSEN
    out,  # [T, heads, DIM], where PARTS is 1
    sums,  # [N, launched parts, heads, DIM] float32: unnormalized
    stats,  # [N, launched parts, heads, 2] float32: largest score in base 2, sum of exponentials
    scale,
    softcap,
    q_row,
    q_head,
    kv_block,
    kv_token,
    kv_head,
    scale_block,
    scale_token,
    table_stride,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FORMAT: tl.constexpr,
    CHOSEN: tl.constexpr,
    DIRECT: tl.constexpr,  # one part is enough for all: write the result
    TILE: tl.constexpr,
    SHORTEST: tl.constexpr,
    PARTS: tl.constexpr,
):
    head = tl.program_id(0)
    part = tl.program_id(1)
    index = tl.program_id(2)
    sequence = index
    row = index
    if CHOSEN:
        sequence = tl.load(members + index)
        row = tl.load(rows + sequence)
    context = tl.load(contexts + sequence)
    begin, length = _span(context, WINDOW, TILE, SHORTEST, PARTS)
    begin += part * length
    end = tl.minimum(begin + length, context)
    if not DIRECT and begin >= end:
        return

    lanes = tl.arange(0, GROUP_PADDED)
    dims = tl.arange(0, DIM_PADDED)
    real = (lanes < GROUP)[:, None] & (dims < DIM)[None, :]
    query_heads = head * GROUP + lanes
    lane = query_heads[:, None] * q_head + dims[None, :]
    queries = tl.load(q + row.to(tl.int64) * q_row + lane, mask=real, other=0.0)

    dtype = q.dtype.element_ty
    keys += head * kv_head
    values += head * kv_head
    tables += sequence.to(tl.int64) * table_stride
    to_base_2 = scale * _LOG2_E
    largest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    mixed = tl.zeros([GROUP_PADDED, DIM_PADDED], tl.float32)
    for start in range(begin, end, TILE):
        positions = start + tl.arange(0, TILE)
        inside = positions < end
        blocks = tl.load(tables + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        offsets = positions % BLOCK_SIZE
        at = (blocks * kv_block + offsets * kv_token)[:, None] + dims[None, :]
        held = inside[:, None] & (dims < DIM)[None, :]
        k = tl.load(keys + at, mask=held, other=0)
        v = tl.load(values + at, mask=held, other=0)
        scores = tl.dot(
            queries, tl.trans(widened(k, dtype, FORMAT)), input_precision="ieee"
        )  # [GROUP_PADDED, TILE]
        if FORMAT != 0:
            scaled_at = blocks * scale_block + offsets * scale_token + head
            key_scale = tl.load(key_scales + scaled_at, mask=inside, other=0.0)
            value_scale = tl.load(value_scales + scaled_at, mask=inside, other=0.0)
            scores *= (key_scale * unit(FORMAT))[None, :]
        if SOFTCAP:
            capped = 2.0 / (1.0 + tl.exp2(scores * (-2.0 * to_base_2 / softcap))) - 1.0
            scores = capped * (softcap * _LOG2_E)
        else:
            scores *= to_base_2
        if WINDOW > 0:
            inside &= positions >= context - WINDOW
        scores = tl.where(inside[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        if FORMAT != 0:
            weights *= (value_scale * unit(FORMAT))[None, :]
        mixed *= shrink[:, None]
        mixed = tl.dot(weights.to(dtype), widened(v, dtype, FORMAT), mixed, input_precision="ieee")
        largest = larger

    heads = tl.num_programs(0) * GROUP
    if DIRECT:
        result = mixed / tl.where(total > 0, total, 1.0)[:, None]
        to = row.to(tl.int64) * heads * DIM + query_heads[:, None] * DIM + dims[None, :]
        tl.store(out + to, result.to(out.dtype.element_ty), mask=real)
    else:
        at = (index.to(tl.int64) * tl.num_programs(1) + part) * heads + query_heads
        tl.store(sums + at[:, None] * DIM + dims[None, :], mixed, mask=real)
        tl.store(stats + at * 2, largest, mask=lanes < GROUP)
        tl.store(stats + at * 2 + 1, total, mask=lanes < GROUP)


@triton.jit(do_not_specialize=["launched"])
def _join(
    sums,  # [N, launched, heads, DIM]
    stats,  # [N, launched, heads, 2]
    contexts,
    members,
    rows,
    out,  # [T, heads, DIM]
    launched,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    WINDOW: tl.constexpr,
    CHOSEN: tl.constexpr,
    TILE: tl.constexpr,
    SHORTEST: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One head of one sequence. All PARTS are added up, in one order, however many there are."""
    head = tl.program_id(0)
    index = tl.program_id(1)
    heads = tl.num_programs(0)
    sequence = index
    row = index
    if CHOSEN:
        sequence = tl.load(members + index)
        row = tl.load(rows + sequence)
    context = tl.load(contexts + sequence)
    begin, length = _span(context, WINDOW, TILE, SHORTEST, PARTS)
    parts = tl.arange(0, PARTS)
    there = parts < tl.cdiv(context - begin, length)
    at = (index.to(tl.int64) * launched + parts) * heads + head
    largest = tl.load(stats + at * 2, mask=there, other=float("-inf"))
    total = tl.load(stats + at * 2 + 1, mask=there, other=0.0)
    top = tl.max(largest, axis=0)
    shrink = tl.exp2(largest - tl.where(context > 0, top, 0.0))
    dims = tl.arange(0, DIM_PADDED)
    held = there[:, None] & (dims < DIM)[None, :]
    mixed = tl.load(sums + at[:, None] * DIM + dims[None, :], mask=held, other=0.0)
    sum_of_all = tl.sum(shrink * total, axis=0)
    result = tl.sum(shrink[:, None] * mixed, axis=0) / tl.where(context > 0, sum_of_all, 1.0)
    to = (row.to(tl.int64) * heads + head) * DIM + dims
    tl.store(out + to, result.to(out.dtype.element_ty), mask=dims < DIM)


@dataclass(frozen=True, slots=True)
class Singles:
    """The sequences of a pass that have one token in it, where not all have."""

    members: Tensor  # [N] int32: which sequences
    rows: Tensor  # [S] int32: the first row of every sequence in the flat batch


@dataclass(frozen=True, slots=True)
class _Cut:
    """How contexts are cut, and by how many programs each."""

    constants: dict[str, int]
    launched: int


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    block_tables: Tensor,
    contexts: Tensor,
    *,
    scale: float,
    max_context: int,
    window: int | None = None,
    softcap: float | None = None,
    singles: Singles | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T scale) v of one token per sequence over its context, the token itself included.

    q [T, heads, head_dim], T = S unless `singles` says which rows attend; keys, values
    [blocks, block_size, kv_heads, head_dim] in any format of the pool, `scales` beside int8 and
    float8, [blocks, block_size, kv_heads]. block_tables [S, B] int32 or int64; contexts [S] int32,
    none above `max_context`. A context of 0 is padding: its table is not read, its row becomes 0.
    `window` w lets a token see the last w of its context. `workspace` is at least what
    `decode_workspace` makes for these sizes. Returns out [T, heads, head_dim], contiguous, of
    which other rows than those that attend are left as they are.
    """
    heads, dim = q.shape[1:]
    block_size, kv_heads = keys.shape[1:3]
    count = len(contexts) if singles is None else len(singles.members)
    assert q.stride(2) == 1
    assert keys.stride() == values.stride()
    assert keys.stride(3) == 1
    assert heads % kv_heads == 0
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert out.is_contiguous()
    if not count:
        return out
    cut = _cut(keys, heads, max_context, window)
    direct = cut.launched == 1
    if workspace is None:
        workspace = decode_workspace(count, heads, keys, max_context, window)
    per_part = count * cut.launched * heads
    assert direct or workspace.numel() >= per_part * (dim + 2)
    sums, stats = workspace[: dim * per_part], workspace[dim * per_part :]
    members, rows = (singles.members, singles.rows) if singles else (contexts, contexts)
    key_scales, value_scales, scale_block, scale_token = scale_views(scales, keys)
    shared = {
        "DIM": dim,
        "DIM_PADDED": max(16, triton.next_power_of_2(dim)),
        "WINDOW": window or 0,
        "CHOSEN": singles is not None,
    }
    group = heads // kv_heads
    _attend[(kv_heads, cut.launched, count)](
        q,
        as_stored(keys),
        as_stored(values),
        key_scales,
        value_scales,
        block_tables,
        contexts,
        members,
        rows,
        out,
        sums,
        stats,
        scale,
        softcap or 1.0,
        q.stride(0),
        q.stride(1),
        *keys.stride()[:3],
        scale_block,
        scale_token,
        block_tables.stride(0),
        GROUP=group,
        GROUP_PADDED=max(16, triton.next_power_of_2(group)),
        BLOCK_SIZE=block_size,
        SOFTCAP=softcap is not None,
        FORMAT=format_of(keys),
        DIRECT=direct,
        **shared,
        **cut.constants,
    )
    if not direct:
        constants = {name: cut.constants[name] for name in ("TILE", "SHORTEST", "PARTS")}
        _join[(heads, count)](
            sums, stats, contexts, members, rows, out, cut.launched, **shared, **constants
        )
    return out


def decode_workspace(
    sequences: int, heads: int, keys: Tensor, max_context: int, window: int | None = None
) -> Tensor:
    """Memory in which `decode_attention` keeps the parts of so many contexts, over a pool of
    `keys`; layers may share it. Empty where contexts are not cut."""
    launched = _cut(keys, heads, max_context, window).launched
    numbers = 0 if launched == 1 else sequences * launched * heads * (keys.shape[3] + 2)
    return torch.empty(numbers, dtype=torch.float32, device=keys.device)


def _cut(keys: Tensor, heads: int, max_context: int, window: int | None) -> _Cut:
    kv_heads, dim = keys.shape[2:]
    # Of five stages two hold keys and values and the others look up blocks: at 64 bfloat16 tokens
    # and head_dim 128, 64 KiB are in flight per program; full bandwidth takes about 40 per
    # multiprocessor. With few key heads there are more parts, so that one long sequence still
    # gives every multiprocessor a program.
    padded, group = triton.next_power_of_2(dim), triton.next_power_of_2(heads // kv_heads)
    tile = min(16384 // padded // max(2, keys.element_size()), 4096 // group, 128)
    default = {
        "TILE": max(16, tile),
        "SHORTEST": 256,
        "PARTS": min(max(triton.next_power_of_2(128 // kv_heads), 8), 64),
        "num_warps": 4,
        "num_stages": 5,
    }
    key = f"{str(keys.dtype).removeprefix('torch.')}-{dim}-{heads}:{kv_heads}"
    constants = tuned("decode_attention", key, default, keys.device)
    tile, shortest = constants["TILE"], constants["SHORTEST"]
    assert shortest % tile == 0
    seen = max_context if window is None else min(max_context, window + tile - 1)
    return _Cut(constants, min(constants["PARTS"], max(1, -(-seen // shortest))))
