"""Drives a decode worker's scheduler over a stream of jobs, on a clock that only work moves.

The clock is the sum of the passes' seconds, and of the seconds that planning took where that is
measured. Idle time is jumped over. So a run takes as long as its engine is busy, and a pause of
the machine between two passes counts for nobody.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from baton.types import Output
from engine.executor import Executor
from scheduling.decode import DecodeScheduler
from scheduling.events import DecodeEvent
from scheduling.simulator.outcome import Outcome, Served
from scheduling.simulator.traffic import Job, Source


@dataclass(slots=True)
class _Live:
    """A job that has been submitted."""

    job: Job
    first_token_at: float = 0.0
    token_times: list[float] = field(default_factory=list)
    tokens: int = 0


class Drive:
    """One run, from the first arrival to the last token."""

    def __init__(
        self,
        scheduler: DecodeScheduler,
        executor: Executor,
        source: Source,
        *,
        measure_planning: bool = False,
        keep_token_times: bool = False,
    ) -> None:
        """`measure_planning` adds the wall time of plan() and apply() to the clock."""
        self._scheduler = scheduler
        self._executor = executor
        self._source = source
        self._measured = measure_planning
        self._keep = keep_token_times
        self._live: dict[str, _Live] = {}
        self._served: list[Served] = []
        self._now = 0.0
        self._busy = 0.0
        self._planning = 0.0
        self._steps = 0
        self._peak = 0
        self._held = 0  # tokens of all live jobs that have run

    def run(self) -> Outcome:
        """Serve everything. Raises RuntimeError if the scheduler stands still with work left."""
        arrivals = iter(self._source.start())
        follow_ups: list[Job] = []
        coming = next(arrivals, None)
        while coming is not None or follow_ups or self._live:
            if not self._live:
                due = [j.arrived_at for j in (coming, *follow_ups) if j is not None]
                self._now = max(self._now, min(due))
            while coming is not None and coming.arrived_at <= self._now:
                self._submit(coming)
                coming = next(arrivals, None)
            for job in [j for j in follow_ups if j.arrived_at <= self._now]:
                follow_ups.remove(job)
                self._submit(job)
            follow_ups += self._step()
        return Outcome(
            served=tuple(self._served),
            makespan=self._now,
            steps=self._steps,
            busy_seconds=self._busy,
            peak_kv_tokens=self._peak,
            scheduler_seconds=self._planning,
        )

    def _submit(self, job: Job) -> None:
        self._live[job.id] = _Live(job)
        self._scheduler.submit(job.request(), job.arrived_at)

    def _step(self) -> list[Job]:
        """One pass; returns the jobs that come because others ended."""
        started = time.perf_counter()
        plan = self._scheduler.plan(self._now)
        self._charge(time.perf_counter() - started)
        if plan is None:
            raise RuntimeError(f"{len(self._live)} jobs are left and nothing can run")
        result = self._executor.execute(plan)
        self._now += result.seconds
        self._busy += result.seconds
        self._steps += 1
        started = time.perf_counter()
        events = self._scheduler.apply(plan, result, self._now)
        self._charge(time.perf_counter() - started)
        return self._take(events)

    def _charge(self, seconds: float) -> None:
        self._planning += seconds
        if self._measured:
            self._now += seconds

    def _take(self, events: list[DecodeEvent]) -> list[Job]:
        follow_ups = []
        ended = 0
        for event in events:
            if not isinstance(event, Output):
                continue
            live = self._live[event.request_id]
            if not live.tokens:
                live.first_token_at = self._now
                self._held += live.job.prompt_tokens
            live.tokens += len(event.token_ids)
            self._held += len(event.token_ids)
            if self._keep:
                live.token_times += [self._now] * len(event.token_ids)
            if event.finish is not None:
                ended += live.job.prompt_tokens + live.tokens
                following = self._finish(live)
                if following is not None:
                    follow_ups.append(following)
        self._peak = max(self._peak, self._held)
        self._held -= ended
        return follow_ups

    def _finish(self, live: _Live) -> Job | None:
        del self._live[live.job.id]
        times = tuple(live.token_times) if self._keep else None
        self._served.append(Served(live.job, live.first_token_at, self._now, token_times=times))
        return self._source.finished(live.job, self._now)
