"""The engine's heartbeat: plan, execute, apply.

All three verbs run on one thread, so that nothing has to be handed over between two passes. What
came of a pass is told on the event loop's thread, while the next one runs. Requests come and go
there, too, at any time: whoever touches the scheduler holds the loop's lock, which the engine's
thread holds while it plans and applies and never while it computes.

Knows nothing of what a scheduler decides, nor of how a pass is computed.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
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
"""Called on the event loop after each pass, with the pass's seconds, in the order of the passes and
before the next one is applied; the scheduler may be planning or computing that one. A request may
have been aborted since. Must not block or raise."""


class EngineLoop(Generic[Event]):
    """Drives one scheduler and one executor.

    Calls to the scheduler from outside are made under `lock`. After every change that can give it
    work (submit, arrived, lost, abort, quiet, release) the caller says `wake`. A pass that raises
    fails the requests in it and the loop goes on. An executor that is broken, or an error in the
    scheduler or in `on_events`, which is a bug, ends the loop and comes out of `wait_closed`.
    """

    def __init__(
        self,
        scheduler: Scheduler[Event],
        executor: Executor,
        on_events: OnEvents[Event],
        *,
        on_idle: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        history: int = 1024,
    ) -> None:
        """`on_idle` is called on the engine's thread when there is nothing to run."""
        self._scheduler = scheduler
        self._executor = executor
        self._on_events = on_events
        self._on_idle = on_idle or (lambda: None)
        self._clock = clock
        self._awake = threading.Event()
        self._told = threading.Event()  # nothing is on its way to `on_events`
        self._told.set()
        self._stopping = False
        self._failure: BaseException | None = None
        self._task: asyncio.Task[None] | None = None
        self.lock = threading.RLock()
        self.steps = 0  # passes that succeeded
        self.recent: deque[StepRecord] = deque(maxlen=history)  # the latest of them, oldest first

    def start(self) -> None:
        """Begin, on the running event loop. Once only."""
        if self._task is not None:
            raise RuntimeError("the engine loop was started before")
        self._task = asyncio.create_task(self._run(), name="engine loop")

    def wake(self) -> None:
        """There may be something to run. Cheap, idempotent, on any thread."""
        self._awake.set()

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
        """Keep the thread. Whoever cancels this waits for the pass that runs."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        thread = threading.Thread(
            target=self._drive, args=(loop, ended), name="engine", daemon=True
        )
        thread.start()
        try:
            await ended.wait()
        finally:
            self._stopping = True
            self._told.set()  # nobody will tell what this thread waits for while it is joined
            self.wake()
            thread.join()
        if self._failure is not None:
            raise self._failure

    # On the engine's thread.

    def _drive(self, loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
        try:
            while not self._stopping:
                self._awake.clear()  # before planning: what comes after it is seen next time
                with self.lock:
                    plan = self._scheduler.plan(self._clock())
                if plan is None:
                    self._on_idle()
                    self._awake.wait()
                else:
                    self._step(plan, loop)
        except BaseException as error:
            self._failure = self._failure or error
        loop.call_soon_threadsafe(ended.set)  # after all that was told

    def _step(self, plan: StepPlan, loop: asyncio.AbstractEventLoop) -> None:
        begun = self._clock()
        try:
            result = self._executor.execute(plan)
        except ExecutorBroken:
            raise
        except Exception:
            _log.exception("a pass of %d tokens failed", plan.tokens)
            result = None
        self._told.wait()  # a slow event loop slows the engine down, instead of falling behind
        self._told.clear()
        now = self._clock()
        with self.lock:
            if result is None:
                seconds, events = now - begun, self._scheduler.fail(plan, now)
            else:
                seconds, events = result.seconds, self._scheduler.apply(plan, result, now)
                self._count(plan, result)
        loop.call_soon_threadsafe(self._tell, plan, events, seconds)

    def _count(self, plan: StepPlan, result: StepResult) -> None:
        self.steps += 1
        if plan.chunks and not plan.swaps_first:  # else its time is not the model's
            self.recent.append(StepRecord.of(plan, result.seconds))

    # On the event loop.

    def _tell(self, plan: StepPlan, events: list[Event], seconds: float) -> None:
        try:
            if self._failure is None:
                self._on_events(plan, events, seconds)
        except BaseException as error:
            self._failure, self._stopping = error, True
            self.wake()
        finally:
            self._told.set()
