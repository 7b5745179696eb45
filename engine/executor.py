"""What runs a plan: torch (engine/model/runner.py), or a cost model in tests and the simulator."""

from __future__ import annotations

from typing import Protocol

from scheduling.plan import Capacity, StepPlan, StepResult


class ExecutorBroken(Exception):
    """The executor cannot run anything any more; what it held is lost."""


class Executor(Protocol):
    """Runs forward passes, one at a time, on one thread of its own."""

    @property
    def capacity(self) -> Capacity:
        """What it runs on; fixed after load."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one pass, or wait for a swap. Reads the plan's sequences, changes none of them;
        writes KV into their blocks. Blocking; the caller keeps the sequences still meanwhile.

        If a pass breaks, its swaps go on all the same, and a later result names them. Raises
        ExecutorBroken when there can be no later pass.
        """
        ...

    def close(self) -> None:
        """End what goes on beside the passes. No pass runs, and none will. Idempotent."""
        ...
