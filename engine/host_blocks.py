"""The KV of a worker as the hand-off sees it: in host memory, wherever the model runs, and on a
device also there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from engine.executor import Executor
from engine.model.pool import KvPool
from engine.model.runner import TorchExecutor
from engine.staged import Pulls, Ref, Report, StagedBlocks, StagedConsumer, saving

if TYPE_CHECKING:
    from engine.gpu.device_blocks import DeviceBlocks
    from engine.gpu.staging import Staging

_log = logging.getLogger(__name__)


def to_publish(
    executor: TorchExecutor, allocate: Callable[[int], memoryview]
) -> tuple[Executor, KvPool | StagedBlocks]:
    """What a prefill worker runs, and the blocks that it publishes. `allocate(bytes)` gives memory
    that others may map; a pool on the host lies in such memory already.

    Where others can copy from the device, its blocks are brought to host memory for those who
    cannot; else all of them, with each pass."""
    staging = _staging(executor, allocate)
    if staging is None:
        return executor, executor.pool
    device = on_device(staging)
    if device is None:
        return saving(executor, staging), staging
    from engine.gpu.device_blocks import SettledExecutor

    return SettledExecutor(executor, device), staging


def to_fill(executor: TorchExecutor) -> KvPool | StagedBlocks:
    """The blocks that a decode worker pulls into."""
    return _staging(executor) or executor.pool


def on_device(store: KvPool | StagedBlocks) -> DeviceBlocks | None:
    """The same blocks on their device, if workers of this host may copy them there."""
    if isinstance(store, KvPool):
        return None
    from engine.gpu.staging import Staging

    return store.device if isinstance(store, Staging) else None  # ranks have a pool each


def filling(consumer: Pulls[Ref, Report], store: KvPool | StagedBlocks) -> Pulls[Ref, Report]:
    """`consumer`, which pulls into `store`, so that what it brings gets to where the model is."""
    if isinstance(store, KvPool):
        return consumer
    if device := on_device(store):
        from engine.gpu.device_blocks import SettledConsumer

        consumer = SettledConsumer(consumer, device.where)
    return StagedConsumer(consumer, store)


def _staging(
    executor: TorchExecutor, allocate: Callable[[int], memoryview] | None = None
) -> StagedBlocks | None:
    """Host memory beside the pools in which the model computes; None if they are on the host."""
    pool = executor.pool
    if executor.staging is not None or _on_host(pool):
        return executor.staging
    from engine.gpu.staging import Staging

    staging = Staging(pool, allocate(pool.blocks * pool.block_bytes) if allocate else None)
    staging.device = _device_blocks(staging, pool, export=allocate is not None)
    return staging


def _device_blocks(staging: Staging, pool: KvPool, *, export: bool) -> DeviceBlocks | None:
    """None where the device's memory cannot be shared."""
    from engine.gpu.device_blocks import DeviceBlocks
    from engine.gpu.shared_memory import memory_of

    where = pool.storage.device
    try:
        found = DeviceBlocks(pool.storage, memory_of(where), partial(staging.save, settled=True))
        if export:
            found.export()
    except OSError as error:
        _log.warning("KV goes by way of host memory: that of %s cannot be shared: %s", where, error)
        return None
    found.warm_up()
    return found


def _on_host(pool: KvPool) -> bool:
    return pool.storage.device.type == "cpu"
