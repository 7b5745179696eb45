"""What runs a plan: torch (engine/model/runner.py), or a cost model in tests and the simulator."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

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


@runtime_checkable
class Pipeline(Executor, Protocol):
    """An executor whose stages work on different passes: it takes up to `capacity.depth` plans, of
    disjoint sequences, before the first result is asked for. Passes end in the order in which they
    began; all calls but `interrupt` come from one thread, `execute` only while none is under
    way."""

    def submit(self, plan: StepPlan) -> Any:
        """Begin a pass; may block as long as its first stage takes, or its swaps where it has to
        wait for them. Reads the plan's sequences, now and until its result is there. Returns what
        `result` wants. Raises as `execute`; then there is no result to ask for."""
        ...

    def ready(self, handle: Any) -> bool:
        """Wait until the result of the oldest pass is there; False if it is not, and `interrupt`
        was called since the last time. Raises as `execute`."""
        ...

    def interrupt(self) -> None:
        """Have `ready` not wait any longer, or not the next time. Never blocks; on any thread."""
        ...

    def result(self, handle: Any) -> StepResult:
        """Wait for the oldest pass. Its seconds count from when it began or the one before it
        ended, whichever was later: those of passes that overlap add up to what has gone by. The
        swaps that have completed may be those of a plan that was submitted later. Raises as
        `execute`."""
        ...
