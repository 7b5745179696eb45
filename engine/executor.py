"""What runs a plan: torch (engine/model/runner.py), or a cost model in tests and the simulator."""

from __future__ import annotations

from typing import Protocol

from scheduling.plan import Capacity, StepPlan, StepResult


class Executor(Protocol):
    """Runs forward passes, one at a time, on one thread of its own."""

    @property
    def capacity(self) -> Capacity:
        """What it runs on; fixed after load."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one pass. Reads the plan's sequences, changes none of them; writes KV into their
        blocks. Blocking; the caller keeps the sequences still meanwhile."""
        ...
