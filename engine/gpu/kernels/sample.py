"""From logits to tokens on the device: what engine/model/sampler.py's `choose` defines in torch.

The same order, the same cuts and the same random numbers, so the same tokens, but where rounding
decides. Nothing is sorted: a cut is the value of the last token that is kept, and is found by
bisection over the bits of the numbers. Everything that a row needs is on the device, positions
too, so that a CUDA graph can sample, pass after pass.

A row goes through four launches: a maximum and a mass for each block of 256 logits, the blocks of
the two-stage draw; the edge below which tokens are cut; the masses of what is left; the draw. Rows
that ask for no cut leave the middle two at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.kernels.launch import tuned
from engine.gpu.kernels.uniforms import gumbel

_BLOCK = 256  # as in engine/model/sampler.py: part of what a seed means


@dataclass(frozen=True, slots=True)
class Draws:
    """How each of S rows is sampled, on the device. Rows are as good as greedy where the
    temperature is 0."""

    temperatures: Tensor  # [S] float32
    top_ks: Tensor  # [S] int32, 0: off
    top_ps: Tensor  # [S] float32, 1: off
    min_scores: Tensor  # [S] float32, the logarithm of min-p, -inf: off
    seeds: Tensor  # [S] int64, all 64 bits
    streams: Tensor  # [S] int32: the sequence's index in its request
    positions: Tensor  # [S] int32: tokens before the one that is drawn


class Space:
    """What sampling writes down on its way, for `rows` rows at most; a graph keeps its own."""

    __slots__ = ("edges", "keys", "masses", "maxima")

    def __init__(self, rows: int, vocabulary: int, device: torch.device | str) -> None:
        blocks = triton.cdiv(vocabulary, _BLOCK)
        new = {"device": device, "dtype": torch.float32}
        self.maxima = torch.empty(rows, blocks, **new)  # type: ignore[call-overload]
        self.masses = torch.empty(rows, blocks, **new)  # type: ignore[call-overload]
        self.edges = torch.empty(rows, **new)  # type: ignore[call-overload]
        self.keys = torch.empty(rows, vocabulary, dtype=torch.int32, device=device)


@triton.jit
def _numbers(here, inside):
    """Logits that can be compared: NaN counts as impossible, +inf as the largest float."""
    x = tl.load(here, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.minimum(tl.where(x == x, x, float("-inf")), 3.4028234663852886e38)


@triton.jit
def _scores(x, most, temperature):
    """(x - most) / temperature, as torch rounds it; most must be possible."""
    return tl.div_rn(x - most, tl.maximum(temperature, 1e-6))


@triton.jit
def _key(score):
    """The bits of a score, which is at most 0, without its sign: better ones have smaller keys."""
    return tl.abs(score).to(tl.int32, bitcast=True)


@triton.jit
def _measure(
    logits,  # [S, vocabulary]
    temperatures,  # [S]; None: only maxima are wanted
    maxima,  # [S, blocks]
    masses,  # [S, blocks]: sums of exp(score), relative to the block's largest
    row_stride,
    vocabulary,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = _numbers(logits + row * row_stride + token, token < vocabulary)
    largest = tl.max(x, axis=1)
    tl.store(maxima + row * blocks + block, largest, mask=block < blocks)
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
        if temperature > 0:
            possible = tl.maximum(largest, -3.4028234663852886e38)[:, None]
            mass = tl.sum(tl.exp(_scores(x, possible, temperature)), axis=1)
            tl.store(masses + row * blocks + block, mass, mask=block < blocks)


@triton.jit
def _weight(keys, end, count, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """What those of `count` keys weigh together that are less than `end`: the mass of their
    tokens, or 1 each."""
    total = end.to(tl.float32) * 0.0
    for start in range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        key = tl.load(keys + index, mask=index < count, other=0x7FFFFFFF)
        weight = tl.where(key < end, 1.0, 0.0)
        if WEIGHED:
            weight = tl.where(key < end, tl.exp(-key.to(tl.float32, bitcast=True)), 0.0)
        total += tl.sum(weight, axis=0)
    return total


@triton.jit
def _last_kept(keys, target, high, count, WEIGHED: tl.constexpr, TILE: tl.constexpr):
    """The key of the last token that is kept, if they are kept from the best down until together
    they weigh `target`: the largest key, at most `high`, below which there is less. The best token
    is always kept. Keys that are not among the `count` are larger than `high`."""
    low = high * 0
    end = high + 1
    while end - low > 1:
        middle = low + (end - low) // 2
        less = _weight(keys, middle, count, WEIGHED, TILE) < target
        low = tl.where(less, middle, low)
        end = tl.where(less, end, middle)
    return low


@triton.jit
def _rank(keys, rank):
    """The key at a rank, from 1, of a vector of keys."""
    low = rank * 0
    end = low + 0x7F800001
    while end - low > 1:
        middle = low + (end - low) // 2
        less = tl.sum((keys < middle).to(tl.int32), axis=0) < rank
        low = tl.where(less, middle, low)
        end = tl.where(less, end, middle)
    return low


@triton.jit
def _collect(
    logits,  # [vocabulary]
    maxima,  # [blocks]
    keys,  # [vocabulary]
    most,
    temperature,
    high,
    vocabulary,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write down the keys of at most `high`, in order of their tokens; returns how many."""
    count = high * 0
    for start in range(0, vocabulary, TILE):
        block = start // BLOCK + tl.arange(0, TILE // BLOCK)
        largest = tl.load(maxima + block, mask=block * BLOCK < vocabulary, other=float("-inf"))
        if _key(_scores(tl.max(largest, axis=0), most, temperature)) <= high:
            token = start + tl.arange(0, TILE)
            x = _numbers(logits + token, token < vocabulary)
            key = _key(_scores(x, most, temperature))
            keep = tl.where(token < vocabulary, key, 0x7FFFFFFF) <= high
            place = count + tl.cumsum(keep.to(tl.int32), axis=0) - 1
            tl.store(keys + place, key, mask=keep)
            count += tl.sum(keep.to(tl.int32), axis=0)
    return count


@triton.jit
def _find_edge(
    logits,
    temperatures,
    top_ks,
    top_ps,
    maxima,
    masses,
    keys,  # [S, vocabulary]
    edges,  # [S]: the least score that top-k and top-p keep
    row_stride,
    vocabulary,
    blocks,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,  # the power of two from blocks
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    temperature = tl.load(temperatures + row)
    by_rank, by_mass = (top_k > 0) & (top_k < vocabulary), top_p < 1.0
    block = tl.arange(0, PADDED)
    here = row * blocks + block
    largest = tl.load(maxima + here, mask=block < blocks, other=float("-inf"))
    most = tl.max(largest, axis=0)
    edge = tl.minimum(most, float("-inf"))
    if (temperature > 0) & (most > float("-inf")) & (by_rank | by_mass):
        scores = _scores(largest, most, temperature)
        mass = tl.load(masses + here, mask=block < blocks, other=0.0)
        total = tl.sum(mass * tl.exp(scores), axis=0)
        high = top_k * 0 + 0x7F800000
        if by_rank:
            # As many blocks have a token at least as good as the best of the top_k-th best block.
            if top_k <= blocks:
                high = _rank(_key(scores), top_k)
        else:
            # All below this together have half of the mass to be cut, at most.
            high = _key(tl.log(tl.maximum((1.0 - top_p) * total / (2.0 * vocabulary), 1e-37)))
        mine = keys + row * vocabulary
        logits_here, maxima_here = logits + row * row_stride, maxima + row * blocks
        count = _collect(
            logits_here, maxima_here, mine, most, temperature, high, vocabulary, BLOCK, TILE
        )
        tl.debug_barrier()
        if by_rank:
            high = _last_kept(mine, top_k.to(tl.float32), high, count, False, TILE)
            total = _weight(mine, high + 1, count, True, TILE)
        if by_mass:
            high = _last_kept(mine, top_p * total, high, count, True, TILE)
        edge = -high.to(tl.float32, bitcast=True)
    tl.store(edges + row, edge)


@triton.jit
def _weigh(
    logits,
    temperatures,
    min_scores,
    maxima,
    masses,
    edges,
    row_stride,
    vocabulary,
    blocks,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Masses anew, of the tokens that are not cut."""
    row = tl.program_id(0).to(tl.int64)
    edge = tl.maximum(tl.load(edges + row), tl.load(min_scores + row))
    temperature = tl.load(temperatures + row)
    every = tl.arange(0, PADDED)
    largest = tl.load(maxima + row * blocks + every, mask=every < blocks, other=float("-inf"))
    most = tl.max(largest, axis=0)
    if (temperature > 0) & (most > float("-inf")) & (edge > float("-inf")):
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = _numbers(logits + row * row_stride + token, token < vocabulary)
        possible = tl.maximum(tl.max(x, axis=1), -3.4028234663852886e38)[:, None]
        kept = _scores(x, most, temperature) >= edge
        relative = tl.where(kept, _scores(x, possible, temperature), float("-inf"))
        mass = tl.sum(tl.exp(relative), axis=1)
        tl.store(masses + row * blocks + block, mass, mask=block < blocks)


@triton.jit
def _draw(
    logits,
    temperatures,  # None: all rows are greedy, and what follows up to maxima is not looked at
    min_scores,
    seeds,
    streams,
    positions,
    masses,
    edges,
    maxima,
    tokens,  # [S]
    row_stride,
    vocabulary,
    blocks,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, PADDED)
    here = row * blocks + block
    largest = tl.load(maxima + here, mask=block < blocks, other=float("-inf"))
    most = tl.max(largest, axis=0)
    chosen = tl.argmax(largest, axis=0)
    offset = tl.arange(0, BLOCK)
    token = chosen * BLOCK + offset
    x = _numbers(logits + row * row_stride + token, token < vocabulary)
    best = chosen * BLOCK + tl.argmax(x, axis=0)
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
        if (temperature > 0) & (most > float("-inf")):
            seed, stream = tl.load(seeds + row), tl.load(streams + row)
            position = tl.load(positions + row)
            mass = tl.load(masses + here, mask=block < blocks, other=0.0)
            log_mass = _scores(largest, most, temperature) + tl.log(tl.maximum(mass, 1e-37))
            log_mass = tl.where(mass > 0, log_mass, float("-inf"))
            noise = gumbel(seed, stream, position, BLOCK + block)
            chosen = tl.argmax(log_mass.to(tl.float64) + noise, axis=0)
            token = chosen * BLOCK + offset
            x = _numbers(logits + row * row_stride + token, token < vocabulary)
            score = _scores(x, most, temperature)
            edge = tl.maximum(tl.load(edges + row), tl.load(min_scores + row))
            score = tl.where(score >= edge, score, float("-inf"))
            noise = gumbel(seed, stream, position, offset)
            best = chosen * BLOCK + tl.argmax(score.to(tl.float64) + noise, axis=0)
    tl.store(tokens + row, tl.where(most > float("-inf"), best, -1).to(tl.int64))


def best_tokens(logits: Tensor, space: Space, out: Tensor | None = None) -> Tensor:
    """The token with the largest of each row's logits [S, vocabulary], the lowest where some tie:
    [S] int64. As engine/model/logits.py: -1 where no token is possible."""
    return _launch(logits, None, space, out)


def sample(logits: Tensor, draws: Draws, space: Space, out: Tensor | None = None) -> Tensor:
    """A token for each row of logits [S, vocabulary] of any float type: [S] int64; -1 where no
    token is possible. Rows of the logits may lie apart."""
    return _launch(logits, draws, space, out)


def _launch(logits: Tensor, draws: Draws | None, space: Space, out: Tensor | None) -> Tensor:
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1
    assert space.keys.shape[0] >= rows
    assert space.keys.shape[1] == vocabulary
    if out is None:
        out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return out
    blocks = space.maxima.shape[1]
    shape = (logits.stride(0), vocabulary, blocks)
    padded = triton.next_power_of_2(blocks)
    temperatures = None if draws is None else draws.temperatures
    # Those that read all logits take some blocks a program; a row's edge is one program's work.
    reading = tuned("sample", str(vocabulary), {"BLOCKS": 8, "num_warps": 4}, logits.device)
    wide = (rows, triton.cdiv(blocks, reading["BLOCKS"]))
    _measure[wide](
        logits, temperatures, space.maxima, space.masses, *shape, BLOCK=_BLOCK, **reading
    )
    if draws is not None:
        _find_edge[(rows,)](
            logits,
            temperatures,
            draws.top_ks,
            draws.top_ps,
            space.maxima,
            space.masses,
            space.keys,
            space.edges,
            *shape,
            BLOCK=_BLOCK,
            PADDED=padded,
            **tuned("edge", str(vocabulary), {"TILE": 4096, "num_warps": 16}, logits.device),
        )
        _weigh[wide](
            logits,
            temperatures,
            draws.min_scores,
            space.maxima,
            space.masses,
            space.edges,
            *shape,
            BLOCK=_BLOCK,
            PADDED=padded,
            **reading,
        )
    _draw[(rows,)](
        logits,
        temperatures,
        None if draws is None else draws.min_scores,
        None if draws is None else draws.seeds,
        None if draws is None else draws.streams,
        None if draws is None else draws.positions,
        space.masses,
        space.edges,
        space.maxima,
        out,
        *shape,
        BLOCK=_BLOCK,
        PADDED=padded,
    )
    return out
