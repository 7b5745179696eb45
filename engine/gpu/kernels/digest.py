"""Digests of whole KV blocks, alone or while they are copied: one launch for any number of blocks.

A digest is a sum modulo 2^64 over the 64-bit words of a block, each mixed with its place in the
lease (moremur's finalizer of 64 bits, by Pelle Evensen). So the parts of a block can be taken in
any order, and equal bytes in another place count as different. It tells damage and mistakes, not
forgery; a copy's digests are of what was read from the source.

Tensors are [blocks, ...] of any format, contiguous; a block is a multiple of 8 bytes. Block numbers
are int64 tensors on the device of the copy's target.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.kernels.launch import tuned

_WORD = torch.int64


# Block numbers are taken one by one, from the middle of a tensor too: no variant for its alignment.
@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["sources", "targets"])
def _digest(
    source,  # [blocks, words]
    target,  # [blocks, words], or None to copy nothing
    sources,  # [N]
    targets,  # [N], or None
    sums,  # [N, programs]
    first,
    words,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    inside = columns < words
    found = tl.load(source + tl.load(sources + index) * words + columns, mask=inside, other=0)
    if target is not None:
        tl.store(target + tl.load(targets + index) * words + columns, found, mask=inside)
    place = (first + index) * words + columns
    mixed = (found + place * 0x2545F4914F6CDD1D).to(tl.uint64, bitcast=True)
    mixed ^= mixed >> 27
    mixed *= 0x3C79AC492BA7B653
    mixed ^= mixed >> 33
    mixed *= 0x1C69B3F74AC4AE35
    mixed ^= mixed >> 27
    mixed = tl.where(inside, mixed.to(tl.int64, bitcast=True), 0)
    tl.store(sums + index * tl.num_programs(1) + part, tl.sum(mixed, axis=0))


def digests(storage: Tensor, blocks: Tensor, first: int) -> Tensor:
    """[N] int64: the digest of storage[blocks[i]] at position first + i of its lease."""
    return _launch(storage, None, blocks, None, first)


def transfer(
    source: Tensor, sources: Tensor, target: Tensor, targets: Tensor, first: int
) -> Tensor:
    """target[targets[i]] = source[sources[i]], and the digests of what was copied, as `digests`.

    `source` may lie on another device that this one can read. No target is another one.
    """
    assert sources.shape == targets.shape
    assert sources.device == targets.device == target.device
    return _launch(source, target, sources, targets, first)


def _launch(
    source: Tensor, target: Tensor | None, sources: Tensor, targets: Tensor | None, first: int
) -> Tensor:
    assert sources.dtype is torch.int64
    origin = _words(source)
    words = origin.shape[1]
    goal = None if target is None else _words(target)
    assert goal is None or goal.shape[1] == words
    # 64 bytes a thread: four loads of 16 bytes in flight.
    chosen = tuned("digest", "any", {"BLOCK": 1024, "num_warps": 4}, sources.device)
    programs = triton.cdiv(words, chosen["BLOCK"])
    sums = torch.empty(len(sources), programs, dtype=torch.int64, device=sources.device)
    if len(sources):
        _digest[(len(sources), programs)](
            origin, goal, sources, targets, sums, first, words, **chosen
        )
    return sums.sum(1)


def _words(blocks: Tensor) -> Tensor:
    """The same memory as [blocks, words]."""
    assert blocks.is_contiguous()
    return blocks.view(len(blocks), -1).view(_WORD)
