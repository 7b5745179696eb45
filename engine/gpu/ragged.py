"""Where the sequences of a pass begin and end, on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.contract import Batch
from engine.gpu.kernels.decode_attention import Singles
from engine.gpu.transfer import to_device

_ALIGNED = 4  # int32 numbers in 16 bytes: kernels are compiled for pointers that are aligned so


@dataclass(frozen=True, slots=True)
class Ragged:
    """A pass as attention kernels read it; made once, for all layers.

    Sequences with a single token attend by their rows, longer chunks by tiles of queries. The
    int32 tensors of a Batch are parts of one, which is copied to the device once.
    """

    contexts: Tensor  # [S] int32: tokens that each has when the pass is done; 0 in a spare row
    block_tables: Tensor  # [S, B] int32 or int64
    chunks: Chunks | None = None  # None if every sequence has a single token
    longest: int | None = None  # context of a sequence with a single token; None if not known

    @classmethod
    def of(cls, batch: Batch) -> Ragged:
        """That of `batch`, on its device."""
        starts, lengths = np.array((batch.starts, batch.lengths), dtype=np.int32)
        contexts, rows = starts + lengths, np.cumsum(lengths, dtype=np.int32) - lengths
        members = np.flatnonzero(lengths == 1).astype(np.int32)
        longest = int(contexts[members].max(initial=0))
        parts = _together(contexts, starts, lengths, rows, members)
        flat = to_device(parts.flat, batch.token_ids.device)
        context, start, length, row, member = (
            flat[place : place + size] for place, size in parts.spans
        )
        chunks = None
        if len(members) < len(lengths):
            chunks = Chunks(start, length, Singles(member, row), (starts, lengths))
        return cls(context, batch.block_tables, chunks, longest)

    @classmethod
    def of_singles(cls, contexts: Tensor, block_tables: Tensor) -> Ragged:
        """One token of each sequence: contexts [S] int32, block_tables [S, B]. Both may be filled
        anew between passes."""
        return cls(contexts, block_tables)

    def longest_single(self, block_size: int) -> int:
        """No sequence with a single token has a longer context; 0 if there is none."""
        most = self.block_tables.shape[1] * block_size
        return most if self.longest is None else self.longest

    @property
    def singles(self) -> Singles | None:
        """Which sequences have a single token; None if all have."""
        return None if self.chunks is None else self.chunks.singles


@dataclass(frozen=True, slots=True)
class Chunks:
    """What a pass that has prompts in it also needs."""

    starts: Tensor  # [S] int32
    lengths: Tensor  # [S] int32
    singles: Singles
    spans: tuple[NDArray[np.int32], NDArray[np.int32]]  # starts and lengths, on the host
    _tiles: dict[int, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> Tensor:
        """[S] int32: the first row of each sequence in the flat batch."""
        return self.singles.rows

    @property
    def longest(self) -> int:
        """Tokens of the longest chunk."""
        return int(self.spans[1].max())

    def tiles(self, queries: int) -> Tensor:
        """[M, 2] int32: sequence, and first of up to `queries` queries of its chunk. Made when it
        is first asked for."""
        if queries not in self._tiles:
            self._tiles[queries] = to_device(_tiles(*self.spans, queries), self.starts.device)
        return self._tiles[queries]


def _tiles(
    starts: NDArray[np.int32], lengths: NDArray[np.int32], queries: int
) -> NDArray[np.int32]:
    """[M, 2]. Long work first: what starts last should not take longest."""
    counts = np.where(lengths > 1, -(-lengths // queries), 0)
    sequences = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    place = np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)
    firsts = (place * queries).astype(np.int32)
    order = np.argsort(-(starts[sequences] + firsts), kind="stable")
    return np.stack((sequences, firsts), axis=1)[order]


@dataclass(frozen=True, slots=True)
class _Together:
    """Arrays end to end, each aligned."""

    flat: NDArray[np.int32]
    spans: list[tuple[int, int]]  # place and length of each


def _together(*parts: NDArray[np.int32]) -> _Together:
    sizes = [len(part) for part in parts]
    places = np.cumsum([0, *(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]).tolist()
    flat = np.zeros(places[-1], dtype=np.int32)
    for part, place in zip(parts, places, strict=False):
        flat[place : place + len(part)] = part
    return _Together(flat, list(zip(places, sizes, strict=False)))
