"""A BlockStore over any buffer, and numpy views of blocks: copying those lets other threads run."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from kv_transfer.contract import BlockStore

Bytes: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class BufferStore:
    """Blocks laid end to end in one writable buffer."""

    def __init__(self, buffer: memoryview | bytearray, block_bytes: int) -> None:
        self._view = memoryview(buffer).cast("B")
        if block_bytes < 1 or len(self._view) % block_bytes:
            raise ValueError(f"{len(self._view)} bytes are not whole blocks of {block_bytes}")
        self._block_bytes = block_bytes

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self._view) // self._block_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self._block_bytes

    def block(self, index: int) -> memoryview:
        """Writable bytes of one block."""
        if not 0 <= index < self.blocks:
            raise IndexError(f"block {index} of {self.blocks}")
        return self._view[index * self._block_bytes : (index + 1) * self._block_bytes]


def block_array(store: BlockStore, index: int) -> Bytes:
    """One block as uint8 numbers, sharing memory: [block_bytes]."""
    return np.frombuffer(store.block(index), np.uint8)
