"""The engine's heartbeat: plan, execute, apply.

Where the executor is a pipeline, several plans are on their way at a time: the first stage gets the
next one before the oldest is applied. While there is room for one more, the loop waits for the
oldest and for what may come from outside, whichever is first.

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
from dataclasses import dataclass
from functools import partial
from typing import Generic, NoReturn, Protocol, TypeVar

from engine.executor import Executor, ExecutorBroken, Pipeline
from scheduling.cost import StepRecord
from scheduling.plan import StepPlan, StepResult

_log = logging.getLogger(__name__)

Event = TypeVar("Event")


class Scheduler(Protocol[Event]):
    """What the loop drives: scheduling.decode.DecodeScheduler or its prefill counterpart."""

    def plan(self, now: float) -> StepPlan | None:
        """The next pass, or None if nothing can run until something comes from outside, or a pass
        that runs is applied. Called with room for one more plan in flight."""
        ...

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[Event]:
        """Take what the oldest pass gave."""
        ...

    def fail(self, plan: StepPlan, now: float) -> list[Event]:
        """The oldest pass broke: give up what was in it."""
        ...


OnEvents = Callable[[StepPlan, list[Event], float], None]
"""Called on the event loop after each pass, with the pass's seconds, in the order of the passes and
before the next one is applied; the scheduler may be planning or computing that one. A request may
have been aborted since. Must not block or raise."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A plan on its way. `end` gives its result, and raises what broke it; before that, `ready`
    waits as Pipeline.ready does."""

    plan: StepPlan
    begun: float
    end: Callable[[], StepResult]
    ready: Callable[[], bool] = lambda: True


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
        self._depth = executor.capacity.depth
        self._pipeline = executor if isinstance(executor, Pipeline) else None
        self._flights: deque[_Flight] = deque()  # oldest first
        self._on_events = on_events
        self._on_idle = on_idle or (lambda: None)
        self._clock = clock
        self._awake = threading.Event()
        self._waits = False  # for a pass, although there is room for another
        self._told = threading.Event()  # nothing is on its way to `on_events`
        self._told.set()
        self._stopping = False
        self._joined = False  # the event loop stands still until the thread has ended
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
        if self._waits and self._pipeline is not None:
            self._pipeline.interrupt()

    async def stop(self) -> None:
        """End after the passes that run now. Raises what `wait_closed` would."""
        self._stopping = True
        self.wake()
        await self.wait_closed()

    async def wait_closed(self) -> None:
        """Return when the loop has stopped; raise the error if it was ended by one."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def _run(self) -> None:
        """Keep the thread. Whoever cancels this waits for the passes that run."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        thread = threading.Thread(
            target=self._drive, args=(loop, ended), name="engine", daemon=True
        )
        thread.start()
        try:
            await ended.wait()
        finally:
            self._stopping = self._joined = True
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
                if plan is not None:
                    self._flights.append(self._begin(plan))
                if len(self._flights) == self._depth:
                    self._step(loop)
                elif plan is None and self._flights:
                    if self._oldest_ends():
                        self._step(loop)
                elif plan is None:
                    self._on_idle()
                    self._awake.wait()
            while self._flights:
                self._step(loop)
        except BaseException as error:
            self._failure = self._failure or error
        loop.call_soon_threadsafe(ended.set)  # after all that was told

    def _begin(self, plan: StepPlan) -> _Flight:
        """Send a plan on its way. What breaks it is told in its turn."""
        begun, pipeline = self._clock(), self._pipeline
        if self._depth == 1:
            return _Flight(plan, begun, partial(self._executor.execute, plan))
        assert pipeline is not None
        try:
            handle = pipeline.submit(plan)
        except ExecutorBroken:
            raise
        except Exception as error:
            return _Flight(plan, begun, partial(_raise, error))
        result, ready = partial(pipeline.result, handle), partial(pipeline.ready, handle)
        return _Flight(plan, begun, result, ready)

    def _oldest_ends(self) -> bool:
        """Wait for the oldest pass. False if there may be something to plan before it ends."""
        assert self._pipeline is not None
        self._waits = True
        if self._awake.is_set():  # by somebody who did not know that yet
            self._pipeline.interrupt()
        try:
            return self._flights[0].ready()
        finally:
            self._waits = False

    def _step(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take what the oldest plan gave."""
        flight = self._flights.popleft()
        plan = flight.plan
        try:
            result = flight.end()
        except ExecutorBroken:
            raise
        except Exception:
            _log.exception("a pass of %d tokens failed", plan.tokens)
            result = None
        if not self._joined:
            self._told.wait()  # a slow event loop slows the engine down, instead of falling behind
        self._told.clear()
        now = self._clock()
        with self.lock:
            if result is None:
                seconds, events = now - flight.begun, self._scheduler.fail(plan, now)
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


def _raise(error: Exception) -> NoReturn:
    raise error
