"""The KV cache of one worker: numbered blocks of keys and values, all layers of a block together.

Knows nothing about who owns which block (scheduling does) or how blocks travel between workers
(kv_transfer does, through `blocks`, `block_bytes` and `block`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What the bytes of a block mean; the fields are those of kv_transfer's KvLayout.

    A block is [layers, 2 (keys, values), block_size, kv_heads, head_dim] of `dtype`, contiguous.
    """

    model_fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str  # torch's name, without "torch."
    block_size: int
    item_size: int  # bytes per number

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one block over all layers."""
        return (self.layers, 2, self.block_size, self.kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return math.prod(self.block_shape) * self.item_size


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
        if buffer is None:
            self.storage = torch.zeros(shape, dtype=dtype, device=device)
        else:
            count = math.prod(shape)
            self.storage = torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)
        self._keys = tuple(self.storage[:, layer, 0] for layer in range(geometry.layers))
        self._values = tuple(self.storage[:, layer, 1] for layer in range(geometry.layers))

    def keys(self, layer: int) -> Tensor:
        """[blocks, block_size, kv_heads, head_dim] view of one layer's keys."""
        return self._keys[layer]

    def values(self, layer: int) -> Tensor:
        """[blocks, block_size, kv_heads, head_dim] view of one layer's values."""
        return self._values[layer]

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
