"""KV that lies in host memory beside the pool that the model computes in, kept equal where the
hand-off looks: executors that save what their passes finish, and a consumer that loads what came.

A prefill worker saves the blocks that a pass has finished before their lease says that they are
final. A decode worker loads the blocks that a pull has brought before their sequence runs. Which
device the pool is on, and over how many ranks, is the business of StagedBlocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as Items
from typing import Any, Generic, Protocol, TypeVar

from engine.executor import Executor, Pipeline
from scheduling.plan import Capacity, StepPlan, StepResult


class StagedBlocks(Protocol):
    """A BlockStore (kv_transfer/contract.py) beside a pool, block for block: the Staging of one
    device (engine/gpu/staging.py), or those of several ranks as one (engine/parallel/joint.py)."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        ...

    def block(self, index: int) -> memoryview:
        """Writable bytes of one block in host memory."""
        ...

    def save(self, blocks: Items[int]) -> None:
        """Copy from the pool, behind all that its device was given so far. Returns when they are
        here."""
        ...

    def load(self, blocks: Items[int]) -> None:
        """Copy to the pool, behind all that its device was given so far. Returns when they are
        there."""
        ...


def finished_blocks(plan: StepPlan, block_size: int) -> list[int]:
    """Blocks that nobody writes to after the pass, unless to generate: those it fills, and the last
    one of each prompt that it completes."""
    found: list[int] = []
    for chunk in plan.chunks:
        end = chunk.start + chunk.length
        until = -(-end // block_size) if chunk.sample else end // block_size
        found += chunk.sequence.blocks[chunk.start // block_size : until]
    return found


def saving(executor: Executor, staging: StagedBlocks) -> Executor:
    """An Executor like `executor` whose results come when the blocks that their pass has finished
    are on the host, too: a prefill worker hands them over from there."""
    if isinstance(executor, Pipeline):
        return SavingPipeline(executor, staging)
    return SavingExecutor(executor, staging)


class SavingExecutor:
    """See `saving`."""

    def __init__(self, executor: Executor, staging: StagedBlocks) -> None:
        self._executor, self._staging = executor, staging

    @property
    def capacity(self) -> Capacity:
        """That of the executor."""
        return self._executor.capacity

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one pass, and save what it finished."""
        return self._saved(plan, self._executor.execute(plan))

    def close(self) -> None:
        """Close the executor."""
        self._executor.close()

    def _saved(self, plan: StepPlan, result: StepResult) -> StepResult:
        self._staging.save(finished_blocks(plan, self.capacity.block_size))
        return result


class SavingPipeline(SavingExecutor):
    """See `saving`; a Pipeline (engine/executor.py)."""

    def __init__(self, executor: Pipeline, staging: StagedBlocks) -> None:
        super().__init__(executor, staging)
        self._pipeline = executor

    def submit(self, plan: StepPlan) -> tuple[StepPlan, Any]:
        """Begin a pass."""
        return plan, self._pipeline.submit(plan)

    def ready(self, handle: tuple[StepPlan, Any]) -> bool:
        """Wait for the oldest pass, or `interrupt`."""
        return self._pipeline.ready(handle[1])

    def interrupt(self) -> None:
        """End the wait in `ready`."""
        self._pipeline.interrupt()

    def result(self, handle: tuple[StepPlan, Any]) -> StepResult:
        """The result of the oldest pass; what it finished is saved."""
        plan, begun = handle
        return self._saved(plan, self._pipeline.result(begun))


class Pulled(Protocol):
    """What this needs of a pull's report."""

    @property
    def on_device(self) -> bool:
        """Whether the blocks are in the device's pool already."""
        ...


Ref = TypeVar("Ref", contravariant=True)
Report = TypeVar("Report", bound=Pulled, covariant=True)


class Pulls(Protocol[Ref, Report]):
    """What this needs of a Consumer."""

    async def pull(self, ref: Ref, into: Items[int], skip: int = 0) -> Report:
        """Bring the blocks of `ref` after the first `skip` into the blocks `into`, of the host's
        memory or of the device."""
        ...


class StagedConsumer(Generic[Ref, Report]):
    """A Consumer (kv_transfer/contract.py) whose blocks are loaded into the device when they have
    come: `consumer` pulls into the staging, if not into the device."""

    def __init__(self, consumer: Pulls[Ref, Report], staging: StagedBlocks) -> None:
        self._consumer, self._staging = consumer, staging

    async def pull(self, ref: Ref, into: Items[int], skip: int = 0) -> Report:
        """As the consumer does; the KV is on the device when this returns."""
        report = await self._consumer.pull(ref, into, skip)
        if report.on_device:
            return report
        loading = asyncio.ensure_future(asyncio.to_thread(self._staging.load, into))
        try:
            await asyncio.shield(loading)
        except asyncio.CancelledError:
            await loading  # nothing may write into the blocks any more when this ends
            raise
        return report
