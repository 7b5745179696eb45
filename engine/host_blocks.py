"""The KV of a worker as the hand-off sees it: in host memory, wherever the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.executor import Executor
from engine.model.pool import KvPool
from engine.model.runner import TorchExecutor

if TYPE_CHECKING:
    from engine.gpu.staging import Pulls, Ref, Report, StagedBlocks


def to_publish(
    executor: TorchExecutor, allocate: Callable[[int], memoryview]
) -> tuple[Executor, KvPool | StagedBlocks]:
    """What a prefill worker runs, and the blocks that it publishes. `allocate(bytes)` gives memory
    that others may map; a pool on the host lies in such memory already."""
    staging = _staging(executor, allocate)
    if staging is None:
        return executor, executor.pool
    from engine.gpu.staging import saving

    return saving(executor, staging), staging


def to_fill(executor: TorchExecutor) -> KvPool | StagedBlocks:
    """The blocks that a decode worker pulls into."""
    return _staging(executor) or executor.pool


def _staging(
    executor: TorchExecutor, allocate: Callable[[int], memoryview] | None = None
) -> StagedBlocks | None:
    """Host memory beside the pools in which the model computes; None if they are on the host."""
    pool = executor.pool
    if executor.staging is not None or _on_host(pool):
        return executor.staging
    from engine.gpu.staging import Staging

    return Staging(pool, allocate(pool.blocks * pool.block_bytes) if allocate else None)


def filling(consumer: Pulls[Ref, Report], store: KvPool | StagedBlocks) -> Pulls[Ref, Report]:
    """`consumer`, which pulls into `store`, so that what it brings gets to where the model is."""
    if isinstance(store, KvPool):
        return consumer
    from engine.gpu.staging import StagedConsumer

    return StagedConsumer(consumer, store)


def _on_host(pool: KvPool) -> bool:
    return pool.storage.device.type == "cpu"
