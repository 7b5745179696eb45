"""One engine by itself, prompts computed where they are decoded: arrivals, passes, outcomes."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable

from scheduling.simulator.outcome import Outcome, Served
from scheduling.simulator.traffic import Job, OpenLoop, Source
from scheduling.simulator.worker import SimulatedWorker, WorkerSpec


def simulate(
    jobs: Iterable[Job] | Source,
    spec: WorkerSpec,
    *,
    keep_token_times: bool = False,
    strides: bool = True,
) -> Outcome:
    """Serve all jobs on one worker. Deterministic. Without `strides` slower, and the same.

    Raises RuntimeError if the scheduler stands still while jobs are left.
    """
    source = jobs if isinstance(jobs, Source) else OpenLoop(jobs)
    worker = SimulatedWorker(spec, keep_token_times=keep_token_times, strides=strides)
    return _Run(source, worker).to_the_end()


class _Run:
    """The clock and the arrivals of one run."""

    def __init__(self, source: Source, worker: SimulatedWorker) -> None:
        self._source = source
        self._worker = worker
        self._initial = iter(source.start())
        self._ahead = next(self._initial, None)
        self._caused: list[tuple[float, int, Job]] = []  # by feedback: a heap
        self._number = 0
        self._served: list[Served] = []
        self._rejected = 0
        self._now = 0.0

    def to_the_end(self) -> Outcome:
        """Run until nothing is left."""
        worker = self._worker
        while True:
            self._submit_until(lambda: self._now)
            if worker.begin(self._now) is not None:
                self._now = self._submit_until(lambda: worker.ends or 0.0)
                self._take(worker.end())
            elif not self._idle():
                break
        return Outcome(
            served=tuple(self._served),
            makespan=max((s.finished_at for s in self._served), default=0.0),
            steps=worker.steps,
            busy_seconds=worker.busy_seconds,
            stall_seconds=worker.executor.stall_seconds,
            peak_kv_tokens=worker.peak_kv_tokens,
            rejected=self._rejected,
            tally=worker.tally(),
        )

    def _idle(self) -> bool:
        """Nothing can run now: go to where something may change. False if nothing is left."""
        wake = self._next_arrival()
        opens_at = self._worker.scheduler.opens_at
        if opens_at is not None:
            wake = min(wake, opens_at)
        if wake == math.inf:
            if self._worker.jobs:
                raise RuntimeError(f"{self._worker.jobs} jobs are left and nothing can run")
            return False
        self._now = max(self._now, wake)
        return True

    def _next_arrival(self) -> float:
        first = math.inf if self._ahead is None else self._ahead.arrived_at
        return min(first, self._caused[0][0]) if self._caused else first

    def _submit_until(self, end: Callable[[], float]) -> float:
        """Hand over what has arrived by `end()`, each job at its own time; returns that end,
        which a job that comes in the middle of a stride brings forward."""
        while self._next_arrival() <= end():
            ahead = self._ahead
            if self._caused and (ahead is None or self._caused[0][0] < ahead.arrived_at):
                job = heapq.heappop(self._caused)[2]
            else:
                assert ahead is not None
                job, self._ahead = ahead, next(self._initial, None)
            if not self._worker.submit(job, job.arrived_at):
                self._rejected += 1
                self._cause(job, job.arrived_at)
        return end()

    def _take(self, served: list[Served]) -> None:
        for each in served:
            self._served.append(each)
            self._cause(each.job, each.finished_at)

    def _cause(self, job: Job, now: float) -> None:
        following = self._source.finished(job, now)
        if following is not None:
            self._number += 1
            heapq.heappush(self._caused, (following.arrived_at, self._number, following))
