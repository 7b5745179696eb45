"""Penalties, bias, allowed tokens and min tokens on the device: what engine/model/logits.py's
`adjust` does, in its order, from tables that stay there and grow with each token sampled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024


@dataclass(frozen=True, slots=True)
class Tables:
    """What changes the logits of each of S rows, on the device. Tokens are int32, numbers float32;
    a row of tokens ends where its length says, or is filled up with -1."""

    seen: Tensor  # [S, L]: each token of prompt and output once
    counts: Tensor  # [S, L] int32: how often it is in the output
    lengths: Tensor  # [S] int32: how many of them there are
    penalties: Tensor  # [S, 3]: repetition (1: off), presence and frequency (0: off)
    bias_tokens: Tensor  # [S, B]: each once
    biases: Tensor  # [S, B]
    allowed: Tensor  # [S, A]; none: all
    ends: Tensor  # [S, E]: tokens that may not come yet, each once
    ends_from: Tensor  # [S] int32: position from which they may
    positions: Tensor  # [S] int32: tokens before the one that is to be sampled


@triton.jit
def _copy(logits, out, row_stride, vocabulary, BLOCK: tl.constexpr):
    """Logits that can be compared, in float32: NaN is impossible, +inf the largest float."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocabulary
    x = tl.load(logits + row * row_stride + token, mask=inside, other=0.0).to(tl.float32)
    x = tl.minimum(tl.where(x == x, x, float("-inf")), 3.4028234663852886e38)
    tl.store(out + row * vocabulary + token, x, mask=inside)


@triton.jit
def _penalize(scores, seen, counts, length, penalties, vocabulary, TILE: tl.constexpr):
    repetition = tl.load(penalties)
    presence, frequency = tl.load(penalties + 1), tl.load(penalties + 2)
    for start in range(0, length, TILE):
        index = start + tl.arange(0, TILE)
        token = tl.load(seen + index, mask=index < length, other=0)
        count = tl.load(counts + index, mask=index < length, other=0)
        here = index < tl.where(token < vocabulary, length, 0)
        x = tl.load(scores + token, mask=here, other=0.0)
        x = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition))
        x -= tl.where(count > 0, presence + frequency * count.to(tl.float32), 0.0)
        tl.store(scores + token, x, mask=here)


@triton.jit
def _bias(scores, tokens, biases, width, vocabulary, TILE: tl.constexpr):
    for start in range(0, width, TILE):
        index = start + tl.arange(0, TILE)
        token = tl.load(tokens + index, mask=index < width, other=-1)
        here = (token >= 0) & (token < vocabulary)
        bias = tl.load(biases + index, mask=here, other=0.0)
        x = tl.load(scores + token, mask=here, other=0.0)
        tl.store(scores + token, x + bias, mask=here)


@triton.jit
def _allow(scores, tokens, kept, width, vocabulary, TILE: tl.constexpr):
    """Only these tokens; `kept` [width] is where their scores wait meanwhile."""
    for start in range(0, width, TILE):
        index = start + tl.arange(0, TILE)
        token = tl.load(tokens + index, mask=index < width, other=-1)
        x = tl.load(scores + token, mask=(token >= 0) & (token < vocabulary), other=0.0)
        tl.store(kept + index, x, mask=index < width)
    tl.debug_barrier()
    for start in range(0, vocabulary, TILE):
        token = start + tl.arange(0, TILE)
        nothing = tl.full([TILE], float("-inf"), tl.float32)
        tl.store(scores + token, nothing, mask=token < vocabulary)
    tl.debug_barrier()
    for start in range(0, width, TILE):
        index = start + tl.arange(0, TILE)
        token = tl.load(tokens + index, mask=index < width, other=-1)
        x = tl.load(kept + index, mask=index < width, other=0.0)
        tl.store(scores + token, x, mask=(token >= 0) & (token < vocabulary))
    tl.debug_barrier()


@triton.jit
def _forbid(scores, tokens, width, vocabulary, ENDS: tl.constexpr, TILE: tl.constexpr):
    """Not these tokens, unless nothing else is possible."""
    index = tl.arange(0, ENDS)
    token = tl.load(tokens + index, mask=index < width, other=-1)
    here = (token >= 0) & (token < vocabulary)
    x = tl.load(scores + token, mask=here, other=0.0)
    tl.store(scores + token, tl.full([ENDS], float("-inf"), tl.float32), mask=here)
    tl.debug_barrier()
    most = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, vocabulary, TILE):
        other = start + tl.arange(0, TILE)
        there = tl.load(scores + other, mask=other < vocabulary, other=float("-inf"))
        most = tl.maximum(most, there)
    if tl.max(most, axis=0) == float("-inf"):
        tl.store(scores + token, x, mask=here)


@triton.jit(do_not_specialize=["seen_width", "bias_width", "allowed_width", "ends_width"])
def _adjust(
    scores,  # [S, vocabulary] float32, changed
    seen,
    counts,
    lengths,
    penalties,
    bias_tokens,
    biases,
    allowed,
    kept,
    ends,
    ends_from,
    positions,
    seen_width,
    bias_width,
    allowed_width,
    ends_width,
    vocabulary,
    ENDS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mine = scores + row * vocabulary
    seen_here, counts_here = seen + row * seen_width, counts + row * seen_width
    length = tl.load(lengths + row)
    _penalize(mine, seen_here, counts_here, length, penalties + row * 3, vocabulary, TILE)
    tl.debug_barrier()
    bias_here = row * bias_width
    _bias(mine, bias_tokens + bias_here, biases + bias_here, bias_width, vocabulary, TILE)
    tl.debug_barrier()
    allowed_here = row * allowed_width
    if tl.load(allowed + allowed_here, mask=allowed_width > 0, other=-1) >= 0:
        _allow(mine, allowed + allowed_here, kept + allowed_here, allowed_width, vocabulary, TILE)
    if tl.load(positions + row) < tl.load(ends_from + row):
        _forbid(mine, ends + row * ends_width, ends_width, vocabulary, ENDS, TILE)


@triton.jit(do_not_specialize=["width"])
def _note(tokens, seen, counts, lengths, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row).to(tl.int32)
    length = tl.load(lengths + row)
    tl.debug_barrier()  # all warps know the length before one changes it
    mine = seen + row * width
    place = length
    for start in range(0, length, TILE):
        index = start + tl.arange(0, TILE)
        other = tl.load(mine + index, mask=index < length, other=-1)
        place = tl.minimum(place, tl.min(tl.where(other == token, index, length), axis=0))
    if (token >= 0) & (place < width):
        count = tl.load(counts + row * width + place, mask=place < length, other=0)
        tl.store(counts + row * width + place, count + 1)
        tl.store(mine + place, token)
        tl.store(lengths + row, tl.maximum(length, place + 1))


def adjust(logits: Tensor, tables: Tables, out: Tensor | None = None) -> Tensor:
    """Changed logits in float32, [S, vocabulary], of those [S, vocabulary] of any float type.

    NaN becomes -inf, and +inf the largest float. Where `ends` would forbid the last token that is
    possible, they yield.
    """
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1
    if out is None:
        out = torch.empty((rows, vocabulary), dtype=torch.float32, device=logits.device)
    assert out.is_contiguous()
    if not rows:
        return out
    _copy[(rows, triton.cdiv(vocabulary, 2048))](
        logits, out, logits.stride(0), vocabulary, BLOCK=2048
    )
    _adjust[(rows,)](
        out,
        tables.seen,
        tables.counts,
        tables.lengths,
        tables.penalties,
        tables.bias_tokens,
        tables.biases,
        tables.allowed,
        torch.empty_like(tables.allowed, dtype=torch.float32),
        tables.ends,
        tables.ends_from,
        tables.positions,
        tables.seen.shape[1],
        tables.bias_tokens.shape[1],
        tables.allowed.shape[1],
        tables.ends.shape[1],
        vocabulary,
        ENDS=triton.next_power_of_2(max(tables.ends.shape[1], 1)),
        TILE=_TILE,
    )
    return out


def note(tokens: Tensor, tables: Tables) -> None:
    """Add each row's sampled token, [S], to its output; -1 is none. What finds no room in `seen`
    is not penalized."""
    if len(tokens):
        _note[(len(tokens),)](
            tokens, tables.seen, tables.counts, tables.lengths, tables.seen.shape[1], TILE=_TILE
        )
