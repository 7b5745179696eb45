"""Where a rank keeps KV.

On CPUs all ranks compute in the one pool of the worker, which they map (engine/parallel/cache.py).
On GPUs each has a pool of its own on its device, with its layers and heads of every block. The pool
of the worker then lies beside them, in host memory that all ranks map, as the hand-off sees it: a
rank saves its share of a block there, and loads it from there. What is swapped out stays in host
memory of each rank's own. Blocks have the same numbers everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.attention.contract import Batch, KvCache
from engine.model.pool import KvGeometry, KvPool, Portion
from engine.model.swap import PoolCopies
from engine.model.swap_lane import OnEnd
from engine.parallel.cache import PartialCache
from engine.parallel.stage import Setup
from engine.parallel.topology import Topology
from scheduling.plan import Capacity


@dataclass(frozen=True, slots=True)
class Room:
    """How much KV all ranks keep."""

    capacity: Capacity
    swap_bandwidth: float  # bytes per second each way, of all ranks together; 0 for no limit


def open_store(setup: Setup, room: Room, shared: memoryview) -> MappedStore | OwnStore:
    """The KV of the rank that `setup` is for; `shared` is the memory of the worker's pool."""
    if setup.own_pools:
        return OwnStore(setup, room, shared)
    return MappedStore(KvPool(setup.geometry, room.capacity.blocks, buffer=shared), setup.topology)


def portion_of(geometry: KvGeometry, topology: Topology) -> Portion:
    """What a rank has of whole blocks."""
    return Portion(geometry, topology.layers(geometry.layers), topology.kv_heads(geometry.kv_heads))


class MappedStore:
    """The KV of one rank, in the worker's pool; rank 0's executor clears its blocks."""

    def __init__(self, pool: KvPool, topology: Topology) -> None:
        self.cache: KvCache = PartialCache(pool, topology)

    def place(self, batch: Batch) -> Batch:
        """A batch where the rank computes, from host memory."""
        return batch


class OwnStore:
    """The KV of one rank, in a pool of its own."""

    def __init__(self, setup: Setup, room: Room, shared: memoryview) -> None:
        """`shared`: memory of the worker's pool, whose blocks are whole."""
        from engine.gpu.staging import Staging

        portion = portion_of(setup.geometry, setup.topology)
        self._room, self._ranks = room, setup.topology.ranks
        self.pool = KvPool(portion.geometry(), room.capacity.blocks, device=setup.device)
        self.cache: KvCache = OwnCache(self.pool, portion.layers)
        self.staging = Staging(self.pool, shared, portion)

    def copies(self, on_end: OnEnd) -> PoolCopies:
        """What swaps this rank's share of blocks; see engine.model.swap.Copies."""
        bandwidth = self._room.swap_bandwidth / self._ranks
        host_blocks = self._room.capacity.host_blocks
        return PoolCopies(self.pool, host_blocks, on_end, bandwidth=bandwidth)

    def place(self, batch: Batch) -> Batch:
        """A batch where the rank computes, from host memory; the blocks that it begins are clear
        there. To be called in the order of the passes."""
        from engine.gpu.passes import placed

        return placed(batch, self.pool)


class OwnCache:
    """A KvCache: the layers of one stage in a pool that has no others. They keep their numbers."""

    def __init__(self, pool: KvPool, layers: range) -> None:
        self.block_size = pool.block_size
        self._pool, self._first = pool, layers.start

    def keys(self, layer: int) -> Tensor:
        """See KvCache."""
        return self._pool.keys(layer - self._first)

    def values(self, layer: int) -> Tensor:
        """See KvCache."""
        return self._pool.values(layer - self._first)

    def scales(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """See KvCache."""
        return self._pool.scales(layer - self._first)
