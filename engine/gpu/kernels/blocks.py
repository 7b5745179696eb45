"""Whole KV blocks moved as bytes, for the hand-off (gather, scatter), and cleared for new owners.
One launch each, for any number of blocks.

Tensors are [blocks, ...] of any format, contiguous; a block is a multiple of 4 bytes, and goes 16
at a time if it is one of 16. Block numbers are int64 tensors on the device. Who owns which block is
the callers' business.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.kernels.launch import tuned

_WORD = torch.int32


@triton.jit
def _move(
    source,  # [blocks, words]
    target,  # [blocks, words]
    sources,  # [N], or None for 0, 1, ...
    targets,  # [N], or None for 0, 1, ...
    words,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    origin, goal = index, index
    if sources is not None:
        origin = tl.load(sources + index)
    if targets is not None:
        goal = tl.load(targets + index)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < words
    found = tl.load(source + origin * words + columns, mask=inside)
    tl.store(target + goal * words + columns, found, mask=inside)


@triton.jit
def _clear(storage, blocks, words, BLOCK: tl.constexpr):
    block = tl.load(blocks + tl.program_id(0))
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], dtype=tl.int32)
    tl.store(storage + block * words + columns, zeros, mask=columns < words)


def gather(storage: Tensor, blocks: Tensor, out: Tensor) -> Tensor:
    """out[i] = storage[blocks[i]]; out [N, ...] on the device, or pinned host memory."""
    _launch(storage, out, blocks, None)
    return out


def scatter(blocks: Tensor, source: Tensor, storage: Tensor) -> None:
    """storage[blocks[i]] = source[i]; source [N, ...] on the device, or pinned host memory."""
    _launch(source, storage, None, blocks)


def clear(storage: Tensor, blocks: Tensor) -> None:
    """storage[blocks[i]] = 0."""
    words = _words(storage)
    if len(blocks):
        assert blocks.dtype is torch.int64
        chosen = _sizes(words)
        _clear[_grid(len(blocks), words, chosen)](words, blocks, words.shape[1], **chosen)


def _launch(source: Tensor, target: Tensor, sources: Tensor | None, targets: Tensor | None) -> None:
    numbers = targets if sources is None else sources
    assert numbers is not None
    assert numbers.dtype is torch.int64
    if not len(numbers):
        return
    origin, goal = _words(source), _words(target)
    assert origin.shape[1] == goal.shape[1]
    chosen = _sizes(target)
    grid = _grid(len(numbers), origin, chosen)
    _move[grid](origin, goal, sources, targets, origin.shape[1], **chosen)


def _words(blocks: Tensor) -> Tensor:
    """The same memory as [blocks, words]."""
    assert blocks.is_contiguous()
    return blocks.view(len(blocks), -1).view(_WORD)


def _sizes(blocks: Tensor) -> dict[str, int]:
    # 64 bytes a thread: four loads of 16 bytes in flight.
    return tuned("blocks", "any", {"BLOCK": 2048, "num_warps": 4}, blocks.device)


def _grid(count: int, words: Tensor, chosen: dict[str, int]) -> tuple[int, int]:
    return count, triton.cdiv(words.shape[1], chosen["BLOCK"])
