"""From one generation pass to the next without the host: what was sampled becomes what is read."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _advance(
    tokens,
    token_ids,
    positions,
    contexts,
    slots,
    tables,
    limits,
    table_stride,
    count,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    context = tl.load(contexts + row, mask=inside, other=0)
    position = tl.load(positions + row, mask=inside, other=0) + 1
    limit = tl.load(limits + row, mask=inside, other=0)
    going = (context > 0) & (position < limit)
    token = tl.load(tokens + row, mask=going, other=0)
    entry = tables + row.to(tl.int64) * table_stride + position // BLOCK_SIZE
    block = tl.load(entry, mask=going, other=0).to(tl.int64)
    slot = tl.where(going, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(token_ids + row, tl.maximum(token, 0).to(tl.int64), mask=going)
    tl.store(positions + row, position, mask=going)
    tl.store(contexts + row, tl.where(going, context + 1, 0), mask=inside)
    tl.store(slots + row, slot.to(tl.int64), mask=inside)


def advance(
    tokens: Tensor,
    *,
    token_ids: Tensor,
    positions: Tensor,
    contexts: Tensor,
    slots: Tensor,
    block_tables: Tensor,
    limits: Tensor,
    block_size: int,
) -> None:
    """Make the inputs of a pass over one token of each of S sequences those of the next pass.

    tokens [S] are what the pass sampled: they become token_ids [S] int64. positions [S] and
    contexts [S] (tokens that each sees, its own included) grow by one, and slots [S] int64 follow
    from block_tables [S, B]. limits [S] are how many positions each sequence's blocks have room
    for. A row that would go beyond them becomes a spare one, and spare ones stay so: slot -1,
    context 0.
    """
    count = len(tokens)
    rows = 128
    assert limits.shape == contexts.shape == positions.shape == slots.shape == (count,)
    assert token_ids.shape == (count,)
    assert len(block_tables) == count
    assert block_tables.stride(1) == 1
    if count:
        _advance[(triton.cdiv(count, rows),)](
            tokens,
            token_ids,
            positions,
            contexts,
            slots,
            block_tables,
            limits,
            block_tables.stride(0),
            count,
            BLOCK_SIZE=block_size,
            ROWS=rows,
        )
