"""Generation passes as CUDA graphs, one per bucket of batch sizes.

A pass over one token of each sequence is hundreds of small kernels; replayed as a graph it costs
the host one launch. A graph always reads the same tensors, so what changes from pass to pass is
copied into them. A bucket's spare rows stand for nothing: slot -1, context 0. On a CPU, and for
what no bucket holds, the same pass is run kernel by kernel.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.gpu.model import GpuLlama, Inputs
from engine.gpu.ragged import Ragged
from engine.gpu.transfer import to_device
from engine.model.pool import KvPool
from scheduling.plan import Capacity

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """One token of each of n sequences, on the host."""

    positions: NDArray[Any]  # [n] int64
    slots: NDArray[Any]  # [n] int64
    tables: NDArray[Any]  # [n, blocks] int32

    @classmethod
    def at(cls, positions: NDArray[Any], tables: NDArray[np.int32], block_size: int) -> DecodeRows:
        """Of these positions and block tables."""
        last = tables[np.arange(len(positions)), positions // block_size].astype(np.int64)
        return cls(positions, last * block_size + positions % block_size, tables)

    def begun(self, block_size: int) -> list[int]:
        """Blocks that the pass begins to fill and does not fill to the end."""
        first = self.positions % block_size == 0
        found: list[int] = (self.slots[first] // block_size).tolist()
        return found if block_size > 1 else []

    def padded(self, rows: int) -> NDArray[Any]:
        """Slots, positions and contexts, [3, rows] int64, with spare rows at the end."""
        count = len(self.positions)
        found = np.zeros((3, rows), dtype=np.int64)
        found[0] = -1
        found[0, :count], found[1, :count] = self.slots, self.positions
        found[2, :count] = self.positions + 1
        return found


def buckets(most: int) -> list[int]:
    """Batch sizes that get a graph: close where a spare row costs a large share of the pass."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 64, 64)]
    return [size for size in sizes if size < most] + [most]


class DecodeGraphs:
    """All graphs of a model; they share the memory of their intermediate results."""

    def __init__(self, model: GpuLlama, pool: KvPool, capacity: Capacity) -> None:
        self._model, self._pool = model, pool
        self._device = pool.storage.device
        self._most = min(capacity.max_sequences, capacity.max_tokens)
        self._positions = capacity.max_context
        self._width = capacity.blocks_for(min(capacity.max_context, capacity.longest_sequence))
        self._graphs: dict[int, _Graph] = {}

    def holds(self, count: int) -> bool:
        """Whether `run` takes so many rows."""
        return self._model.rotations.fixed and count <= self._most

    def record(self) -> None:
        """Record the graphs, largest first, so that the smaller ones find their memory there."""
        if self._device.type != "cuda" or not self._model.rotations.fixed:
            return
        memory = torch.cuda.graph_pool_handle()
        for rows in reversed(buckets(self._most)):
            self._graphs[rows] = _Graph(self._static(rows), self._model, self._pool, memory)
        _log.info("recorded %d CUDA graphs, up to %d sequences", len(self._graphs), self._most)

    def run(self, rows: DecodeRows, token_ids: Tensor) -> Tensor:
        """The logits of one pass, [n, vocab_size]; the next one overwrites them.

        token_ids [n] int64 on the device.
        """
        count = len(rows.positions)
        bucket = min((size for size in self._graphs if size >= count), default=0)
        if bucket:
            return self._graphs[bucket].replay(rows, token_ids)[:count]
        numbers = to_device(rows.padded(count), self._device)
        tables = to_device(rows.tables, self._device)
        return self._model.logits(self._inputs(token_ids, numbers, tables), None, self._pool)

    def _static(self, rows: int) -> Inputs:
        """Tensors for a graph, of spare rows only."""
        numbers = torch.zeros((3, rows), dtype=torch.int64, device=self._device)
        numbers[0] = -1
        tables = torch.zeros((rows, self._width), dtype=torch.int32, device=self._device)
        ids = torch.zeros(rows, dtype=torch.int64, device=self._device)
        return self._inputs(ids, numbers, tables)

    def _inputs(self, token_ids: Tensor, numbers: Tensor, tables: Tensor) -> Inputs:
        """Of slots, positions and contexts [3, n] and block tables [n, blocks]."""
        ragged = Ragged.of_singles(contexts=numbers[2].int(), block_tables=tables)
        rotations = self._model.rotations.upto(self._positions)
        return Inputs(token_ids, numbers[0], rotations, numbers[1], ragged)


class _Graph:
    """One recorded pass and the tensors that it reads and writes."""

    def __init__(self, inputs: Inputs, model: GpuLlama, pool: KvPool, memory: Any) -> None:
        self._inputs = inputs
        model.logits(inputs, None, pool)  # kernels are compiled outside of the recording
        torch.cuda.synchronize()
        # Other threads may look at events meanwhile: those that swap, and NCCL's.
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory, capture_error_mode="thread_local"):
            self._logits = model.logits(inputs, None, pool)

    def replay(self, rows: DecodeRows, token_ids: Tensor) -> Tensor:
        """Logits [rows of the bucket, vocab_size]; the next replay overwrites them."""
        inputs, device = self._inputs, token_ids.device
        numbers = to_device(rows.padded(len(inputs.token_ids)), device)
        inputs.token_ids[: len(token_ids)].copy_(token_ids)
        inputs.slots.copy_(numbers[0])
        inputs.rotation_rows.copy_(numbers[1])
        inputs.ragged.contexts.copy_(numbers[2])
        count, width = rows.tables.shape
        inputs.ragged.block_tables[:count, :width].copy_(to_device(rows.tables, device))
        self._graph.replay()
        return self._logits
