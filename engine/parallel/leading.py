"""Runs plans on shards in lockstep, without a gap between passes."""

from __future__ import annotations

from functools import partial
from typing import Any

from engine.executor import ExecutorBroken
from engine.gpu.executor import GpuExecutor
from engine.model.pool import KvPool
from engine.parallel.executor import OverRanks
from engine.parallel.model import ParallelModel
from scheduling.plan import Capacity, StepPlan, StepResult


class LeadingExecutor(OverRanks, GpuExecutor):
    """A GpuExecutor of rank 0, whose launches are everybody's."""

    def __init__(
        self, model: ParallelModel, pool: KvPool, capacity: Capacity, **options: Any
    ) -> None:
        """Over the worker's pool; `options` as of GpuExecutor."""
        self._parallel = model
        super().__init__(
            model.fused_model(),
            pool,
            capacity,
            swapper=model.swapper(),
            launcher=partial(model.launcher, capacity),
            **options,
        )
        self._device = model.device

    def _execute(self, plan: StepPlan) -> StepResult:
        """See GpuExecutor. Raises ExecutorBroken when a rank is lost."""
        try:
            result = super()._execute(plan)
        except RuntimeError as error:
            raise ExecutorBroken(self._parallel.obituary()) from error
        self._parallel.require_ranks()
        return result
