"""Shards of a GpuLlama that run the same launches: with CUDA graphs, and ahead of the plans.

Rank 0 is engine/gpu's executor, which tells the others of each launch before its own. Where it goes
on from tokens that only its device knows, they are broadcast from there, so that no host looks at
them. Rank 0 gets all columns of the logits and draws alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.contract import Batch
from engine.gpu.graphs import DecodeRows
from engine.gpu.model import GpuLlama
from engine.gpu.passes import Passes
from engine.gpu.transfer import to_device
from engine.model.pool import KvPool
from engine.parallel.group import Group
from engine.parallel.message import Kind, kind_of, pack, say, unpack
from scheduling.plan import Capacity


class Leader:
    """The Others (engine/gpu/launcher.py) of rank 0."""

    def __init__(self, tell: Callable[[bytes], None], shards: Group, vocab_size: int) -> None:
        """`tell` brings a message to every other rank."""
        self._tell, self._shards, self._vocab_size = tell, shards, vocab_size

    def record(self) -> None:
        """See Others."""
        self._tell(say(Kind.RECORD))

    def batch(self, batch: Batch) -> None:
        """See Others."""
        self._tell(pack(batch))

    def rows(self, rows: DecodeRows, token_ids: NDArray[np.int64] | None) -> None:
        """See Others."""
        self._tell(pack_rows(rows, token_ids))

    def tokens(self, token_ids: Tensor) -> Tensor:
        """See Others."""
        return self._shards.broadcast(token_ids)

    def logits(self, logits: Tensor) -> Tensor:
        """See Others."""
        parts = self._shards.gather(logits) if len(logits) else None
        return torch.cat(parts, -1)[:, : self._vocab_size] if parts else logits


class Follower:
    """Another rank: launches what rank 0 says, over its own pool."""

    def __init__(self, model: GpuLlama, pool: KvPool, capacity: Capacity, shards: Group) -> None:
        self._passes, self._shards = Passes(model, pool, capacity), shards
        self._device, self._block_size = pool.storage.device, pool.block_size

    def do(self, message: bytes) -> None:
        """What the leader told."""
        match kind_of(message):
            case Kind.RECORD:
                self._passes.record()
            case Kind.ROWS:
                self._rows(message)
            case _:
                self._give(self._passes.batch(unpack(message, self._block_size)))

    def _rows(self, message: bytes) -> None:
        rows, known = unpack_rows(message, self._block_size)
        if known is None:
            ids = torch.empty(len(rows.positions), dtype=torch.int64, device=self._device)
            ids = self._shards.broadcast(ids)
        else:
            ids = to_device(known, self._device)
        self._give(self._passes.rows(rows, ids))

    def _give(self, logits: Tensor) -> None:
        if len(logits):
            self._shards.gather(logits)


def pack_rows(rows: DecodeRows, token_ids: NDArray[np.int64] | None) -> bytes:
    """A generation pass; None if its tokens are not known to the host."""
    count, width = rows.tables.shape
    parts = [
        np.array([Kind.ROWS, count, width], np.int32),
        rows.positions.astype(np.int32),
        rows.tables.astype(np.int32).ravel(),
    ]
    if token_ids is not None:
        parts.append(token_ids.astype(np.int32))
    return np.concatenate(parts).tobytes()


def unpack_rows(data: bytes, block_size: int) -> tuple[DecodeRows, NDArray[np.int64] | None]:
    """What was packed."""
    numbers: NDArray[np.int32] = np.frombuffer(bytearray(data), np.int32)  # torch may write to it
    count, width = numbers[1:3].tolist()
    at, tables, ids = np.split(numbers[3:], np.cumsum((count, count * width)))
    tables = tables.reshape(count, width)
    rows = DecodeRows.at(at.astype(np.int64), tables, block_size)
    return rows, ids.astype(np.int64) if len(ids) else None
