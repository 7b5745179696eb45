"""The KV of a worker as the hand-off sees it: in host memory, wherever the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.executor import Executor
from engine.model.pool import KvPool
from engine.model.runner import TorchExecutor

if TYPE_CHECKING:
    from engine.gpu.staging import Pulls, Ref, Report, Staging


def to_publish(
    executor: TorchExecutor, allocate: Callable[[int], memoryview]
) -> tuple[Executor, KvPool | Staging]:
    """What a prefill worker runs, and the blocks that it publishes. `allocate(bytes)` gives memory
    that others may map; a pool on the host lies in such memory already."""
    if _on_host(executor.pool):
        return executor, executor.pool
    from engine.gpu.staging import SavingExecutor, Staging

    staging = Staging(executor.pool, allocate(executor.pool.blocks * executor.pool.block_bytes))
    return SavingExecutor(executor, staging), staging


def to_fill(pool: KvPool) -> KvPool | Staging:
    """The blocks that a decode worker pulls into."""
    if _on_host(pool):
        return pool
    from engine.gpu.staging import Staging

    return Staging(pool)


def filling(consumer: Pulls[Ref, Report], store: KvPool | Staging) -> Pulls[Ref, Report]:
    """`consumer`, which pulls into `store`, so that what it brings gets to where the model is."""
    if isinstance(store, KvPool):
        return consumer
    from engine.gpu.staging import StagedConsumer

    return StagedConsumer(consumer, store)


def _on_host(pool: KvPool) -> bool:
    return pool.storage.device.type == "cpu"
