"""Has a device compute the passes of one model over one pool, and does not wait for them."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
from torch import Tensor

from engine.attention.contract import Batch
from engine.gpu.graphs import DecodeGraphs, DecodeRows
from engine.gpu.kernels.blocks import clear
from engine.gpu.model import GpuLlama
from engine.gpu.transfer import batch_to_device, to_device
from engine.model.batch import begun_in
from engine.model.pool import KvPool
from scheduling.plan import Capacity


class Passes:
    """Logits of passes, in the order in which they are given."""

    def __init__(self, model: GpuLlama, pool: KvPool, capacity: Capacity) -> None:
        self._model, self._pool = model, pool
        self._graphs = DecodeGraphs(model, pool, capacity)

    def record(self) -> None:
        """Record the graphs of generation passes."""
        self._graphs.record()

    def holds(self, count: int) -> bool:
        """Whether `rows` takes so many."""
        return self._graphs.holds(count)

    def batch(self, batch: Batch) -> Tensor:
        """Of a batch that lies in host memory: the logits of its rows [R, vocab_size]."""
        batch = placed(batch, self._pool)
        return self._model.logits(self._model.inputs(batch), batch.logit_rows, self._pool)

    def rows(self, rows: DecodeRows, token_ids: Tensor) -> Tensor:
        """Of a generation pass, whose tokens [n] int64 are on the device: [n, vocab_size]. The next
        one overwrites them."""
        _clear(self._pool, rows.begun(self._pool.block_size))
        return self._graphs.run(rows, token_ids)


def placed(batch: Batch, pool: KvPool) -> Batch:
    """A batch from host memory on the pool's device, where the blocks that it begins are cleared.
    To be called in the order of the passes."""
    _clear(pool, begun_in(batch, pool.block_size))
    return batch_to_device(batch, pool.storage.device)


def _clear(pool: KvPool, blocks: Items[int]) -> None:
    """What KvPool.clear does, without a wait and with one launch."""
    if blocks:
        clear(pool.storage, to_device(np.array(blocks, np.int64), pool.storage.device))
