"""KV blocks in host memory, for sequences that are swapped out."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from engine.model.pool import KvGeometry

_log = logging.getLogger(__name__)
_SLAB_BYTES = 32 * 2**20


class HostPool:
    """`blocks` numbered blocks. Memory is taken a slab at a time, when a block of it is first
    asked for, and kept: a pool that is never used costs nothing.

    A block holds anything at first: it is read only after a swap has filled it.
    """

    def __init__(self, geometry: KvGeometry, blocks: int, *, pinned: bool) -> None:
        """`pinned`: page-locked, which copies to and from a GPU need to go on by themselves."""
        self.blocks = blocks
        self._shape = geometry.block_shape
        self._dtype = getattr(torch, geometry.dtype)
        self._slab_blocks = max(1, _SLAB_BYTES // geometry.block_bytes)
        self._pinned = pinned
        self._slabs: dict[int, Tensor] = {}

    @property
    def allocated(self) -> int:
        """Blocks that memory has been taken for."""
        return sum(len(slab) for slab in self._slabs.values())

    def block(self, index: int) -> Tensor:
        """One block, of the geometry's block shape, contiguous."""
        if not 0 <= index < self.blocks:
            raise IndexError(f"block {index} of a host pool of {self.blocks}")
        slab, place = divmod(index, self._slab_blocks)
        if slab not in self._slabs:
            self._slabs[slab] = self._allocate(slab)
        return self._slabs[slab][place]

    def _allocate(self, slab: int) -> Tensor:
        count = min(self._slab_blocks, self.blocks - slab * self._slab_blocks)
        shape = (count, *self._shape)
        if self._pinned:
            try:
                return torch.empty(shape, dtype=self._dtype, pin_memory=True)
            except RuntimeError as error:  # the system limits locked pages
                _log.warning("host KV memory is not pinned, which makes swapping slow: %s", error)
                self._pinned = False
        return torch.empty(shape, dtype=self._dtype)
