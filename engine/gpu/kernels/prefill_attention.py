"""Attention of prompt chunks over the paged contexts that they continue: FlashAttention-2.

A program takes one key head and some query rows of one chunk, for all query heads that share the
key head: these are rows of one tile, so short chunks fill it, too. Tiles of keys that every row
sees in full are passed without a mask, the others (the diagonal, the edge of a window) with one
(Dao, "FlashAttention-2", 2023).
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.kernels.kv_formats import as_stored, format_of, scale_views, unit, widened
from engine.gpu.kernels.launch import architecture, tuned

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _over_keys(
    mixed,  # [ROWS, DIM_PADDED] float32
    total,  # [ROWS]
    largest,  # [ROWS]
    queries,  # [ROWS, DIM_PADDED]
    places,  # [ROWS] positions of the queries
    keys,
    values,
    key_scales,
    value_scales,
    table,
    kv_block,
    kv_token,
    scale_block,
    scale_token,
    scale,
    softcap,
    begin,
    end,  # of the keys
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FORMAT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The keys [begin, end), a TILE at a time; unless MASKED all rows see all of them, and they
    are whole tiles."""
    dtype = queries.dtype
    dims = tl.arange(0, DIM_PADDED)
    to_base_2 = scale * _LOG2_E
    for start in range(begin, end, TILE):
        positions = start + tl.arange(0, TILE)
        if MASKED:
            inside = positions < end
            blocks = tl.load(table + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        else:
            blocks = tl.load(table + positions // BLOCK_SIZE).to(tl.int64)
        offsets = positions % BLOCK_SIZE
        at = (blocks * kv_block + offsets * kv_token)[:, None] + dims[None, :]
        if MASKED:
            held = inside[:, None] & (dims < DIM)[None, :]
            k = tl.load(keys + at, mask=held, other=0)
            v = tl.load(values + at, mask=held, other=0)
        elif DIM_PADDED > DIM:
            k = tl.load(keys + at, mask=(dims < DIM)[None, :], other=0)
            v = tl.load(values + at, mask=(dims < DIM)[None, :], other=0)
        else:
            k = tl.load(keys + at)
            v = tl.load(values + at)
        scores = tl.dot(
            queries, tl.trans(widened(k, dtype, FORMAT)), input_precision="ieee"
        )  # [ROWS, TILE]
        if FORMAT != 0:
            scaled_at = blocks * scale_block + offsets * scale_token
            key_scale = tl.load(key_scales + scaled_at)  # of block 0 where not inside
            value_scale = tl.load(value_scales + scaled_at)
            scores *= (key_scale * unit(FORMAT))[None, :]
        if SOFTCAP:
            capped = 2.0 / (1.0 + tl.exp2(scores * (-2.0 * to_base_2 / softcap))) - 1.0
            scores = capped * (softcap * _LOG2_E)
        else:
            scores *= to_base_2
        if MASKED:
            seen = inside[None, :] & (positions[None, :] <= places[:, None])
            if WINDOW > 0:
                seen &= positions[None, :] > places[:, None] - WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        # A row of a window may see nothing of the first tiles.
        base = tl.where(larger == float("-inf"), 0.0, larger) if MASKED and WINDOW > 0 else larger
        shrink = tl.exp2(largest - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        if FORMAT != 0:
            weights *= (value_scale * unit(FORMAT))[None, :]
        mixed *= shrink[:, None]
        mixed = tl.dot(weights.to(dtype), widened(v, dtype, FORMAT), mixed, input_precision="ieee")
        largest = larger
    return mixed, total, largest


@triton.jit(do_not_specialize=["table_stride"])
def _attend(
    q,  # [T, heads, DIM]
    keys,  # [blocks, BLOCK_SIZE, kv_heads, DIM]
    values,
    key_scales,  # [blocks, BLOCK_SIZE, kv_heads], not for FLOAT
    value_scales,
    tables,  # [S, B]
    starts,  # [S]
    lengths,  # [S]
    rows,  # [S] first rows of q
    tiles,  # [N, 2]: sequence, and first query of its chunk
    out,  # [T, heads, DIM]
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
    QUERIES: tl.constexpr,  # per tile
    ROWS: tl.constexpr,  # at least QUERIES * GROUP
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FORMAT: tl.constexpr,
    TILE: tl.constexpr,
):
    head = tl.program_id(0)
    number = tl.program_id(1)
    sequence = tl.load(tiles + 2 * number)
    first = tl.load(tiles + 2 * number + 1)
    start = tl.load(starts + sequence)
    length = tl.load(lengths + sequence)

    places = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PADDED)
    query = first + places // GROUP
    query_head = head * GROUP + places % GROUP
    real = (places < QUERIES * GROUP) & (query < length)
    row = (tl.load(rows + sequence) + query).to(tl.int64)
    held = real[:, None] & (dims < DIM)[None, :]
    from_ = (row * q_row + query_head * q_head)[:, None] + dims[None, :]
    queries = tl.load(q + from_, mask=held, other=0.0)

    end = start + tl.minimum(first + QUERIES, length)  # behind the last key that is seen
    begin = 0  # of the keys, then where all rows see all of a tile, then where no longer
    full = 0
    if WINDOW > 0:
        begin = tl.maximum(start + first + 1 - WINDOW, 0) // TILE * TILE
        full = tl.minimum(tl.cdiv(tl.maximum(end - WINDOW, 0), TILE) * TILE, end)
    diagonal = tl.maximum((start + first + 1) // TILE * TILE, full)

    keys += head * kv_head
    values += head * kv_head
    if FORMAT != 0:
        key_scales += head
        value_scales += head
    table = tables + sequence.to(tl.int64) * table_stride
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    positions = start + query
    # fmt: off
    if WINDOW > 0:
        mixed, total, largest = _over_keys(
            mixed, total, largest, queries, positions, keys, values, key_scales, value_scales,
            table, kv_block, kv_token, scale_block, scale_token, scale, softcap, begin, full,
            DIM, DIM_PADDED, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, FORMAT, MASKED=True,
        )
    mixed, total, largest = _over_keys(
        mixed, total, largest, queries, positions, keys, values, key_scales, value_scales,
        table, kv_block, kv_token, scale_block, scale_token, scale, softcap, full, diagonal,
        DIM, DIM_PADDED, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, FORMAT, MASKED=False,
    )
    mixed, total, largest = _over_keys(
        mixed, total, largest, queries, positions, keys, values, key_scales, value_scales,
        table, kv_block, kv_token, scale_block, scale_token, scale, softcap, diagonal, end,
        DIM, DIM_PADDED, BLOCK_SIZE, TILE, WINDOW, SOFTCAP, FORMAT, MASKED=True,
    )
    # fmt: on
    # A row beyond the last query may have seen nothing.
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    heads = tl.num_programs(0) * GROUP
    to = ((row * heads + query_head) * DIM)[:, None] + dims[None, :]
    tl.store(out + to, result.to(out.dtype.element_ty), mask=held)


def tile_queries(q: Tensor, kv_heads: int, longest: int) -> int:
    """Queries in a tile where the longest chunk has `longest`, for q [T, heads, head_dim]: 128 rows
    of all heads that share a key head, or fewer for short chunks and where rows are wide."""
    _, heads, dim = q.shape
    group = heads // kv_heads
    most = 128 if dim <= 128 and q.element_size() <= 2 else 64
    rows: int = min(most, max(16, triton.next_power_of_2(longest * group)))
    return max(1, rows // group)


class Chunks(Protocol):
    """The chunks of a pass (engine/gpu/ragged.py); its sequences with a single token are in no
    tile."""

    @property
    def starts(self) -> Tensor:
        """[S] int32: the position that each begins at."""
        ...

    @property
    def lengths(self) -> Tensor:
        """[S] int32."""
        ...

    @property
    def rows(self) -> Tensor:
        """[S] int32: the first row of each in the flat batch."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        ...

    def tiles(self, queries: int) -> Tensor:
        """[M, 2] int32: sequence, and first of up to `queries` queries of its chunk."""
        ...


def prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    block_tables: Tensor,
    chunks: Chunks,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of the `chunks` of a pass, over KV that is in the pool already.

    q [T, heads, head_dim]; keys, values [blocks, block_size, kv_heads, head_dim] in any format of
    the pool, `scales` beside int8 and float8, [blocks, block_size, kv_heads]; block_tables [S, B]
    int32 or int64. `window` w lets position p see [p - w + 1, p]. Returns out [T, heads,
    head_dim], contiguous, of which other rows than those of the chunks are left as they are.
    """
    heads, dim = q.shape[1:]
    block_size, kv_heads = keys.shape[1:3]
    group = heads // kv_heads
    assert q.stride(2) == 1
    assert keys.stride() == values.stride()
    assert keys.stride(3) == 1
    assert heads % kv_heads == 0
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    assert out.is_contiguous()
    queries = tile_queries(q, kv_heads, chunks.longest)
    tiles = chunks.tiles(queries)
    rows = max(16, triton.next_power_of_2(queries * group))
    key_scales, value_scales, scale_block, scale_token = scale_views(scales, keys)
    _attend[(kv_heads, len(tiles))](
        q,
        as_stored(keys),
        as_stored(values),
        key_scales,
        value_scales,
        block_tables,
        chunks.starts,
        chunks.lengths,
        chunks.rows,
        tiles,
        out,
        scale,
        softcap or 1.0,
        q.stride(0),
        q.stride(1),
        *keys.stride()[:3],
        scale_block,
        scale_token,
        block_tables.stride(0),
        GROUP=group,
        QUERIES=queries,
        ROWS=rows,
        DIM=dim,
        DIM_PADDED=max(16, triton.next_power_of_2(dim)),
        BLOCK_SIZE=block_size,
        WINDOW=window or 0,
        SOFTCAP=softcap is not None,
        FORMAT=format_of(keys),
        **_tiles(keys, rows, window),
    )
    return out


def _tiles(keys: Tensor, rows: int, window: int | None) -> dict[str, int]:
    dim = keys.shape[3]
    wide = triton.next_power_of_2(dim)
    # Before Hopper, operands and sums share the registers.
    roomy = architecture() >= 90 or (window is None and keys.element_size() == 2)
    default = {
        "TILE": 64 if roomy and wide <= 128 and keys.element_size() <= 2 else 32,
        "num_warps": 8 if rows * wide >= 128 * 64 or keys.element_size() == 4 else 4,
        "num_stages": 5,
    }
    key = f"{str(keys.dtype).removeprefix('torch.')}-{dim}-{rows}"
    return tuned("prefill_attention", key, default, keys.device)
