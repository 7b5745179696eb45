"""Drives a decode worker's scheduler over a stream of jobs, on a clock that only work moves.

The clock is the sum of the passes' seconds, and of the processor seconds that planning them took.
Idle time is jumped over. So a run takes as long as its engine is busy, and what else the machine
does meanwhile counts for nobody.
"""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass, field
from typing import Protocol

from baton.types import Output
from scheduling.decode import DecodeScheduler
from scheduling.events import DecodeEvent
from scheduling.plan import StepPlan, StepResult
from scheduling.rules import Rules
from scheduling.sequence import Sequence
from scheduling.simulator.outcome import Outcome, Served, Tally
from scheduling.simulator.traffic import Job, Source


class JobExecutor(Protocol):
    """An executor that is told of the jobs behind the sequences. `pace`: what a second of this
    thread's processor is worth now, on the clock of the run."""

    @property
    def pace(self) -> float:
        """See above."""
        ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one pass, as engine.executor.Executor does."""
        ...

    def expect(self, job: Job) -> None:
        """A job is about to be submitted."""
        ...

    def forget(self, job: Job) -> None:
        """A job has ended."""
        ...


@dataclass(slots=True)
class _Live:
    """A job that has been submitted."""

    job: Job
    sequence: Sequence
    first_token_at: float | None = None
    token_times: list[float] = field(default_factory=list)


class Drive:
    """One run, from the first arrival to the last token."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        executor: JobExecutor,
        source: Source,
        *,
        rules: Rules | None = None,
        keep_token_times: bool = False,
    ) -> None:
        """`rules` are the scheduler's."""
        self._scheduler = scheduler
        self._executor = executor
        self._source = source
        self._rules = rules or Rules()
        self._keep = keep_token_times
        self._initial = iter(source.start())
        self._ahead = next(self._initial, None)
        self._caused: list[tuple[float, int, Job]] = []  # by feedback: a heap
        self._number = 0
        self._live: dict[str, _Live] = {}
        self._served: list[Served] = []
        self._now = 0.0
        self._busy = 0.0
        self._planning = 0.0
        self._steps = 0
        self._kv_tokens = 0
        self._peak = 0
        self._preemptions = 0

    def run(self) -> Outcome:
        """Serve everything. Raises RuntimeError if the scheduler stands still with work left."""
        while self._live or self._next_arrival() < math.inf:
            self._submit_due()
            if not self._live or not self._step():
                self._idle()
        preemptions = self._scheduler.preemptions
        return Outcome(
            served=tuple(self._served),
            makespan=self._now,
            steps=self._steps,
            busy_seconds=self._busy,
            peak_kv_tokens=self._peak,
            scheduler_seconds=self._planning,
            tally=Tally(preemptions=preemptions),
        )

    # -- Jobs come -------------------------------------------------------------------------

    def _next_arrival(self) -> float:
        first = math.inf if self._ahead is None else self._ahead.arrived_at
        return min(first, self._caused[0][0]) if self._caused else first

    def _idle(self) -> None:
        """Go to where something may change."""
        wake = self._next_arrival()
        if self._live and self._rules.filling == "dynamic":
            wake = min(wake, self._now + self._rules.dynamic_wait)
        if wake == math.inf:
            if self._live:
                raise RuntimeError(f"{len(self._live)} jobs are left and nothing can run")
            return
        self._now = max(self._now, wake)

    def _submit_due(self) -> None:
        while self._next_arrival() <= self._now:
            ahead = self._ahead
            if self._caused and (ahead is None or self._caused[0][0] < ahead.arrived_at):
                job = heapq.heappop(self._caused)[2]
            else:
                assert ahead is not None
                job, self._ahead = ahead, next(self._initial, None)
            self._executor.expect(job)
            (sequence,) = self._scheduler.submit(job.request(), job.arrived_at)
            self._live[job.id] = _Live(job, sequence)

    # -- Passes ----------------------------------------------------------------------------

    def _step(self) -> bool:
        """One pass; False if nothing can run."""
        started = time.thread_time()
        plan = self._scheduler.plan(self._now)
        self._charge(time.thread_time() - started)
        if plan is None:
            return False
        result = self._executor.execute(plan)
        self._now += result.seconds
        self._busy += result.seconds
        self._steps += 1
        started = time.thread_time()
        events = self._scheduler.apply(plan, result, self._now)
        self._charge(time.thread_time() - started)
        self._count_kv(plan)
        self._take(events)
        return True

    def _charge(self, seconds: float) -> None:
        worth = seconds * self._executor.pace
        self._planning += worth
        self._now += worth

    def _count_kv(self, plan: StepPlan) -> None:
        """Tokens whose KV is held, before anything that ended in this pass lets go of it."""
        self._kv_tokens += plan.tokens
        if self._scheduler.preemptions != self._preemptions:
            self._preemptions = self._scheduler.preemptions
            self._kv_tokens = sum(live.sequence.computed for live in self._live.values())
        self._peak = max(self._peak, self._kv_tokens)

    def _take(self, events: list[DecodeEvent]) -> None:
        for event in events:
            if isinstance(event, Output):
                live = self._live[event.request_id]
                if live.first_token_at is None:
                    live.first_token_at = self._now
                if self._keep:
                    live.token_times.append(self._now)
                if event.finish is not None:
                    self._finish(live, live.first_token_at)

    def _finish(self, live: _Live, first_token_at: float) -> None:
        job = live.job
        del self._live[job.id]
        self._executor.forget(job)
        self._kv_tokens -= job.prompt_tokens + job.output_tokens - 1
        times = tuple(live.token_times) if self._keep else None
        self._served.append(
            Served(job, first_token_at, self._now, live.sequence.preemptions, times)
        )
        following = self._source.finished(job, self._now)
        if following is not None:
            self._number += 1
            heapq.heappush(self._caused, (following.arrived_at, self._number, following))
