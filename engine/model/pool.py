"""The KV cache of one worker: numbered blocks of keys and values, all layers of a block together.

In int8 and float8 a pool is planes of bytes, in which numbers and their scales are views; whoever
moves whole blocks (swapping, the hand-off) sees bytes in every format.

Knows nothing about who owns which block (scheduling does) or how blocks travel between workers
(kv_transfer does, through `blocks`, `block_bytes` and `block`).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baton.errors import ConfigError

_SCALE = torch.float32
_SCALED = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}  # as --kv-dtype names them


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What the bytes of a block mean; the fields are those of kv_transfer's KvLayout.

    A block is [layers, 2 (keys, values)] planes, contiguous. A plane is
    [block_size, kv_heads, head_dim] of `dtype`; in int8 and float8_e4m3fn, [block_size, kv_heads]
    scales after it.
    """

    model_fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str  # torch's name, without "torch."
    block_size: int
    item_size: int  # bytes per number
    scale_size: int = 0  # bytes of the scale that the numbers of one token and head share

    @classmethod
    def of(
        cls,
        model_fingerprint: str,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        block_size: int,
    ) -> KvGeometry:
        """That of KV in `dtype`. Raises ConfigError where a scaled one cannot hold such heads."""
        scaled = _SCALED.get(dtype)
        if scaled and head_dim % _SCALE.itemsize:
            raise ConfigError(f"--kv-dtype {scaled}: head_dim {head_dim} is no multiple of 4")
        return cls(
            model_fingerprint,
            layers,
            kv_heads,
            head_dim,
            str(dtype).removeprefix("torch."),
            block_size,
            dtype.itemsize,
            _SCALE.itemsize if scaled else 0,
        )

    @property
    def plane_shape(self) -> tuple[int, int, int]:
        """Shape of the numbers of a plane."""
        return (self.block_size, self.kv_heads, self.head_dim)

    @property
    def plane_bytes(self) -> int:
        """Bytes of one layer's keys, or values, of a block."""
        head = self.head_dim * self.item_size + self.scale_size
        return self.block_size * self.kv_heads * head

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of one block over all layers, as a pool stores it: planes of bytes if scaled."""
        plane = (self.plane_bytes,) if self.scale_size else self.plane_shape
        return (self.layers, 2, *plane)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.layers * 2 * self.plane_bytes


@dataclass(frozen=True, slots=True)
class Portion:
    """What a pool has of blocks that several share: some layers, and some heads of them."""

    whole: KvGeometry
    layers: range
    heads: range

    def geometry(self) -> KvGeometry:
        """That of its own blocks."""
        return replace(self.whole, layers=len(self.layers), kv_heads=len(self.heads))

    def of(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """Its share of whole blocks [N, *block_shape]: views, see `numbers_and_scales`."""
        layers = slice(self.layers.start, self.layers.stop)
        heads = slice(self.heads.start, self.heads.stop)
        parts = numbers_and_scales(blocks, self.whole)
        return tuple(part[:, layers, :, :, heads] for part in parts)


class KvPool:
    """`blocks` blocks of KV on one device; satisfies attention's KvCache and, on a CPU, the
    hand-off's BlockStore.

    All blocks are free for use, none is reserved. A block starts as zeros and must stay finite:
    attention multiplies the unused tail of a sequence's last block by zero, which would spread a
    NaN that an earlier owner left there. Hence `clear`.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        blocks: int,
        *,
        device: torch.device | str = "cpu",
        buffer: memoryview | None = None,
    ) -> None:
        """`buffer`: writable, zeroed memory of at least `blocks * block_bytes` to live in, such
        as a shared mapping; the pool keeps it alive."""
        self.geometry = geometry
        self.blocks = blocks
        self.block_size = geometry.block_size
        self.block_bytes = geometry.block_bytes
        dtype = getattr(torch, geometry.dtype)
        shape = (blocks, *geometry.block_shape)
        if buffer is None and torch.device(device).type == "cpu":
            buffer = _on_huge_pages(blocks * self.block_bytes)
        if buffer is None:
            self.storage = torch.zeros(shape, dtype=dtype, device=device)
        else:
            count = math.prod(shape)
            self.storage = torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)
        layers = range(geometry.layers)
        numbers, *scales = numbers_and_scales(self.storage, geometry)
        self._keys = tuple(numbers[:, layer, 0] for layer in layers)
        self._values = tuple(numbers[:, layer, 1] for layer in layers)
        self._scales = tuple(
            (scales[0][:, layer, 0], scales[0][:, layer, 1]) if scales else None for layer in layers
        )

    def keys(self, layer: int) -> Tensor:
        """[blocks, block_size, kv_heads, head_dim] view of one layer's keys."""
        return self._keys[layer]

    def values(self, layer: int) -> Tensor:
        """[blocks, block_size, kv_heads, head_dim] view of one layer's values."""
        return self._values[layer]

    def scales(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """[blocks, block_size, kv_heads] views of the scales of one layer's keys and values; None
        if the numbers are what they seem."""
        return self._scales[layer]

    def block(self, index: int) -> memoryview:
        """Writable bytes of one block, over all layers, contiguous. On a CPU only."""
        if not 0 <= index < self.blocks:
            raise IndexError(f"block {index} of a pool of {self.blocks}")
        view: memoryview = self.storage[index].view(-1).view(torch.uint8).numpy().data
        return view

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero these blocks, before a sequence begins to fill them."""
        for block in blocks:
            self.storage[block].zero_()


def _on_huge_pages(size: int) -> memoryview:
    """Zeroed memory, on huge pages where the kernel gives them: a sequence's blocks lie apart, and
    with small pages each costs several misses of address translation."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def numbers_and_scales(blocks: Tensor, geometry: KvGeometry) -> tuple[Tensor, ...]:
    """Views of blocks [N, *block_shape]: the numbers [N, layers, 2, block_size, kv_heads, head_dim]
    and, if they are scaled, the scales [N, layers, 2, block_size, kv_heads]."""
    if not geometry.scale_size:
        return (blocks,)
    count, shape = math.prod(geometry.plane_shape), blocks.shape[:3]
    numbers = blocks[..., :count].view(*shape, *geometry.plane_shape)
    scales = blocks[..., count:].view(_SCALE)
    return numbers, scales.view(*shape, *geometry.plane_shape[:2])
