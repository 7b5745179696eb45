"""The KV of a worker with several ranks, and what one of them sees of it.

On CPUs all ranks map the one pool of the worker, in the layout of the hand-off ([blocks, layers, 2]
planes of all key heads), and each takes a strided view of its layers and heads. So hand-off, swaps
and the scheduler deal with one pool, whatever the degrees of parallelism, and workers of different
degrees understand each other's KV.
"""

from __future__ import annotations

from torch import Tensor

from engine.model.pool import KvPool
from engine.parallel.topology import Topology


class PartialCache:
    """A KvCache (engine/attention/contract.py): the heads of one shard in the pool of all. Layers
    keep their numbers."""

    def __init__(self, pool: KvPool, topology: Topology) -> None:
        self.block_size = pool.block_size
        heads = topology.kv_heads(pool.geometry.kv_heads)
        here, total = slice(heads.start, heads.stop), range(pool.geometry.layers)
        self._keys = tuple(pool.keys(layer)[:, :, here] for layer in total)
        self._values = tuple(pool.values(layer)[:, :, here] for layer in total)
        self._scales = tuple(_narrow(pool.scales(layer), here) for layer in total)

    def keys(self, layer: int) -> Tensor:
        """[blocks, block_size, kv_heads of the shard, head_dim] view."""
        return self._keys[layer]

    def values(self, layer: int) -> Tensor:
        """[blocks, block_size, kv_heads of the shard, head_dim] view."""
        return self._values[layer]

    def scales(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """[blocks, block_size, kv_heads of the shard] views, or None."""
        return self._scales[layer]


def _narrow(scales: tuple[Tensor, Tensor] | None, heads: slice) -> tuple[Tensor, Tensor] | None:
    return None if scales is None else (scales[0][:, :, heads], scales[1][:, :, heads])
