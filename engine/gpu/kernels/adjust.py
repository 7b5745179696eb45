"""Penalties, bias, allowed tokens and min tokens on the device: what engine/model/logits.py's
`adjust` does, in its order.

What a sequence has seen and what it may not say are rows of tables over the whole vocabulary, so
each logit is changed by itself, and a token more costs one number.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.kernels.launch import tuned

WANTS = np.dtype(
    [
        ("counts", np.int32),  # row of `counts`, -1: no penalties
        ("biases", np.int32),  # row of `biases`, -1: none
        ("newest", np.int32),  # its token that `counts` does not know yet, -1: it knows all
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
    ]
)
"""What one row of logits wants, as the host writes it down and the kernel reads it."""

FIELDS = len(WANTS.names or ())
_FIELDS: tl.constexpr = tl.constexpr(FIELDS)
_TILE = 1024


@triton.jit
def _adjust(
    logits,  # [S, vocabulary]
    out,  # [S, vocabulary] float32
    wants,  # [S, 6] int32
    newest,  # [S] int64, or None
    counts,  # [C, vocabulary] int32
    biases,  # [B, vocabulary] float32
    row_stride,
    vocabulary,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    mine = wants + row * _FIELDS
    x = tl.load(logits + row * row_stride + token, mask=inside, other=0.0).to(tl.float32)
    x = tl.minimum(tl.where(x == x, x, float("-inf")), 3.4028234663852886e38)
    counted, biased = tl.load(mine).to(tl.int64), tl.load(mine + 1).to(tl.int64)
    if counted >= 0:
        fresh = tl.load(mine + 2)
        if newest is not None:
            fresh = tl.where(fresh >= 0, tl.load(newest + row).to(tl.int32), fresh)
        here = counts + counted * vocabulary + token
        seen = tl.load(here, mask=inside, other=0)
        seen += tl.where(token == fresh, 2, 0)
        tl.store(here, seen, mask=inside & (token == fresh))
        repetition = tl.load(mine + 3).to(tl.float32, bitcast=True)
        presence = tl.load(mine + 4).to(tl.float32, bitcast=True)
        frequency = tl.load(mine + 5).to(tl.float32, bitcast=True)
        repeated = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition))
        x = tl.where(seen > 0, repeated, x)
        times = (seen >> 1).to(tl.float32)
        x -= tl.where(times > 0, presence + frequency * times, 0.0)
        x = tl.minimum(x, 3.4028234663852886e38)
    if biased >= 0:
        x += tl.load(biases + biased * vocabulary + token, mask=inside, other=0.0)
    tl.store(out + row * vocabulary + token, x, mask=inside)


@triton.jit(do_not_specialize=["width"])
def _forbid(
    scores,  # [S, vocabulary] float32, changed
    rows,  # [R] int32
    tokens,  # [R, width] int32, -1: none
    width,
    vocabulary,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Not these tokens, unless nothing else is possible."""
    mine = scores + tl.load(rows + tl.program_id(0)).to(tl.int64) * vocabulary
    index = tl.arange(0, WIDTH)
    listed = tokens + tl.program_id(0) * width + index
    token = tl.load(listed, mask=index < width, other=-1)
    here = (token >= 0) & (token < vocabulary)
    x = tl.load(mine + token, mask=here, other=0.0)
    tl.store(mine + token, tl.full([WIDTH], float("-inf"), tl.float32), mask=here)
    tl.debug_barrier()
    most = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, vocabulary, TILE):
        other = start + tl.arange(0, TILE)
        there = tl.load(mine + other, mask=other < vocabulary, other=float("-inf"))
        most = tl.maximum(most, there)
    if tl.max(most, axis=0) == float("-inf"):
        tl.store(mine + token, x, mask=here)


def adjust(
    logits: Tensor,
    wants: Tensor,
    counts: Tensor,
    biases: Tensor,
    newest: Tensor | None = None,
) -> Tensor:
    """Changed logits in float32, [S, vocabulary], of those [S, vocabulary] of any float type. NaN
    becomes -inf, and +inf the largest float; a row that wants nothing is only that.

    wants [S, 6] int32: `WANTS` of each row, on the device. counts [C, vocabulary] int32: for each
    token twice the times that it is in the output, and 1 more if it is in the prompt; a row's
    newest token, one of the output, is added to it. newest [S] int64: those newest tokens, if only
    the device knows them; then `wants` says with any token that there is one. biases
    [B, vocabulary] float32, -inf for what is not allowed. No two rows may want the same row of
    `counts`.
    """
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1
    assert wants.shape == (rows, FIELDS)
    out = torch.empty((rows, vocabulary), dtype=torch.float32, device=logits.device)
    chosen = tuned("adjust", "any", {"BLOCK": 2048, "num_warps": 4}, logits.device)
    if rows:
        _adjust[(rows, triton.cdiv(vocabulary, chosen["BLOCK"]))](
            logits, out, wants, newest, counts, biases, logits.stride(0), vocabulary, **chosen
        )
    return out


def forbid(scores: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """Make tokens[i] impossible in row rows[i] of the scores [S, vocabulary] float32, or leave the
    row as it is if no other token is possible. rows [R] int32; tokens [R, width] int32, -1: none;
    each once."""
    count, width = tokens.shape
    assert scores.is_contiguous()
    if count and width:
        _forbid[(count,)](
            scores,
            rows,
            tokens,
            width,
            scores.shape[1],
            WIDTH=max(16, triton.next_power_of_2(width)),  # one kernel for nearly all
            TILE=_TILE,
        )
