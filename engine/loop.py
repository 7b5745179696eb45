"""The engine's heartbeat: plan, execute, apply.

The scheduler is touched on the event loop's thread only; the executor runs on one thread of its
own. Requests come and go on the event loop while a pass runs: schedulers are built for that.

Knows nothing of what a scheduler decides, nor of how a pass is computed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from engine.executor import Executor, ExecutorBroken
from scheduling.cost import StepRecord
from scheduling.plan import StepPlan, StepResult

_log = logging.getLogger(__name__)

Event = TypeVar("Event")


class Scheduler(Protocol[Event]):
    """What the loop drives: scheduling.decode.DecodeScheduler or its prefill counterpart."""

    def plan(self, now: float) -> StepPlan | None:
        """The next pass, or None if nothing can run until something comes from outside."""
        ...

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]:
        """Take what the pass gave."""
        ...

    def fail(self, plan: StepPlan, now: float) -> list[Event]:
        """The pass broke: give up what was in it."""
        ...


OnEvents = Callable[[StepPlan, list[Event], float], None]
"""Called on the event loop after each pass, with the pass's seconds. Must not block or raise."""


class EngineLoop(Generic[Event]):
    """Drives one scheduler and one executor.

    After every change that can give it work (submit, arrived, lost, abort, quiet, release) the
    caller says `wake`. A pass that raises fails the requests in it and the loop goes on. An
    executor that is broken, or an error in the scheduler or in `on_events`, which is a bug, ends
    the loop and comes out of `wait_closed`.
    """

    def __init__(
        self,
        scheduler: Scheduler[Event],
        executor: Executor,
        on_events: OnEvents[Event],
        *,
        clock: Callable[[], float] = time.monotonic,
        history: int = 1024,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._on_events = on_events
        self._clock = clock
        self._wakeup = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self.steps = 0  # passes that succeeded
        self.recent: deque[StepRecord] = deque(maxlen=history)  # the latest of them, oldest first

    def start(self) -> None:
        """Begin, on the running event loop. Once only."""
        if self._task is not None:
            raise RuntimeError("the engine loop was started before")
        self._task = asyncio.create_task(self._run(), name="engine loop")

    def wake(self) -> None:
        """There may be something to run. To be called on the event loop; cheap, idempotent."""
        self._wakeup.set()

    async def stop(self) -> None:
        """End after the pass that runs now. Raises what `wait_closed` would."""
        self._stopping = True
        self.wake()
        await self.wait_closed()

    async def wait_closed(self) -> None:
        """Return when the loop has stopped; raise the error if it was ended by one."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def _run(self) -> None:
        with ThreadPoolExecutor(1, thread_name_prefix="engine") as thread:
            while not self._stopping:
                self._wakeup.clear()  # before planning: what comes after it is seen next time
                plan = self._scheduler.plan(self._clock())
                if plan is None:
                    await self._wakeup.wait()
                else:
                    await self._step(plan, thread)

    async def _step(self, plan: StepPlan, thread: ThreadPoolExecutor) -> None:
        begun = self._clock()
        try:
            result = await asyncio.get_running_loop().run_in_executor(
                thread, self._executor.execute, plan
            )
        except ExecutorBroken:
            raise
        except Exception:
            _log.exception("a pass of %d tokens failed", plan.tokens)
            now = self._clock()
            self._on_events(plan, self._scheduler.fail(plan, now), now - begun)
            return
        self.steps += 1
        if plan.chunks and not plan.swaps_first:  # else its time is not the model's
            self.recent.append(StepRecord.of(plan, result.seconds))
        events = self._scheduler.apply(plan, result, self._clock())
        self._on_events(plan, events, result.seconds)
