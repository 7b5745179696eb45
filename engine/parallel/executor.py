"""Runs plans on several ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from engine.attention.contract import Batch
from engine.model.batch import ChunkRows
from engine.model.model import Output
from engine.model.runner import Outcome, TorchExecutor
from engine.parallel.model import ParallelModel
from scheduling.plan import StepPlan, StepResult

if TYPE_CHECKING:
    from engine.staged import StagedBlocks


@dataclass(frozen=True, slots=True)
class Handle:
    """A pass that has begun; without a batch if it only waits for a swap. `output` as of
    ParallelModel.begin."""

    plan: StepPlan
    begun: float
    batch: Batch | None = None
    rows: tuple[ChunkRows, ...] = ()
    output: Output | None = None


class OverRanks(TorchExecutor):
    """What executors over a model that has been opened have in common. Ends the ranks when it is
    closed."""

    _parallel: ParallelModel

    @property
    def staging(self) -> StagedBlocks | None:
        """See TorchExecutor."""
        return self._parallel.staging

    def close(self) -> None:
        """End the ranks, and the threads that swap. Idempotent."""
        super().close()
        self._parallel.close()

    def _clear(self, blocks: Items[int]) -> None:
        """Pools that ranks have of their own are cleared with the passes."""
        if self.staging is None:
            super()._clear(blocks)


class ParallelExecutor(OverRanks):
    """An Executor over a model that has been started, and a Pipeline (engine/executor.py) if it has
    stages: while the later ones compute, this process runs the first one of the next pass."""

    def __init__(self, model: ParallelModel, *arguments: Any, **options: Any) -> None:
        """As TorchExecutor, over the worker's pool."""
        super().__init__(model, *arguments, swapper=model.swapper(), **options)
        self._parallel, self._device = model, model.device
        self._ended = 0.0  # when the last result was there

    def submit(self, plan: StepPlan) -> Handle:
        """Begin a pass: its swaps, and this rank's share of it."""
        begun = time.perf_counter()
        self._use_threads()
        self._begin_swaps(plan)
        if not plan.chunks:
            return Handle(plan, begun)
        with torch.inference_mode():
            batch, rows = self._build(plan)
            return Handle(plan, begun, batch, rows, self._parallel.begin(batch))

    def ready(self, handle: Handle) -> bool:
        """Wait for the output of the oldest pass, or `interrupt`. What only waits for a swap is
        waited for in `result`."""
        return handle.batch is None or handle.output is not None or self._parallel.ready()

    def interrupt(self) -> None:
        """End the wait in `ready`."""
        self._parallel.interrupt()

    def result(self, handle: Handle) -> StepResult:
        """The output of the oldest pass, sampled here."""
        if handle.batch is None:
            if not handle.plan.swaps_first:
                self._swapper.wait_for_any()
            outcome: Outcome = ((), ())
        else:
            with torch.inference_mode():
                output = self._parallel.finish(handle.batch, handle.output)
                outcome = self._outcome(handle.plan, handle.rows, output)
            self._parallel.require_ranks()
        begun, self._ended = max(handle.begun, self._ended), time.perf_counter()
        return StepResult(*outcome, self._ended - begun, swapped=self._swapper.collect())
