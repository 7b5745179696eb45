"""What a run gave, of a simulated or of a real engine, and the metrics computed from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from scheduling.simulator.traffic import Job

Times = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Served:
    """One finished job; times in seconds from the start of the run. `token_times`, one per output
    token, is None unless the run was asked to keep them."""

    job: Job
    first_token_at: float
    finished_at: float
    preemptions: int = 0
    token_times: tuple[float, ...] | None = None

    @property
    def completion(self) -> float:
        """Job completion time (JCT): arrival to last token."""
        return self.finished_at - self.job.arrived_at

    @property
    def to_first_token(self) -> float:
        """TTFT."""
        return self.first_token_at - self.job.arrived_at

    @property
    def per_output_token(self) -> float:
        """TPOT: seconds per token after the first; 0 for outputs of one token."""
        following = self.job.output_tokens - 1
        return (self.finished_at - self.first_token_at) / following if following else 0.0

    @property
    def normalized(self) -> float:
        """Completion time over output tokens: the per-token latency of FastServe and vLLM."""
        return self.completion / self.job.output_tokens


@dataclass(frozen=True, slots=True)
class Tally:
    """Counters of a run, over all its workers."""

    preemptions: int = 0  # sequences that gave up their blocks, of either kind below
    recomputed: int = 0  # by throwing their KV away
    swapped_out: int = 0  # sequences moved to host memory
    swapped_in: int = 0
    swapped_blocks: int = 0  # both ways
    mispredictions: int = 0  # allotments that were exceeded
    prompt_tokens: int = 0  # that were computed, some perhaps more than once


@dataclass(frozen=True, slots=True)
class Outcome:
    """A whole run.

    `makespan`: start to last token. `busy_seconds`: sum of all passes, over all workers.
    `stall_seconds`: the part of that in which nothing was computed because swaps had to end
    first. `peak_kv_tokens`: most tokens whose KV was held at once, host memory included, on the
    worker that held most. `scheduler_seconds`: time spent deciding, where it was measured.
    `warmup`: jobs at the head of the run that `served` no longer holds.
    """

    served: tuple[Served, ...]
    makespan: float
    steps: int
    busy_seconds: float
    stall_seconds: float = 0.0
    peak_kv_tokens: int = 0
    rejected: int = 0
    scheduler_seconds: float = 0.0
    tally: Tally = field(default_factory=Tally)

    def after_warmup(self, share: float = 0.1) -> Outcome:
        """The same run without the first `share` of its jobs by arrival. What is counted for
        the whole run (makespan, steps, peaks, tallies) stays."""
        ordered = sorted(self.served, key=lambda s: s.job.arrived_at)
        return replace(self, served=tuple(ordered[int(share * len(ordered)) :]))

    # -- Per job ---------------------------------------------------------------------------

    def completion(self) -> Times:
        """JCT of every job, in seconds."""
        return self._each(lambda s: s.completion)

    def first_token(self) -> Times:
        """TTFT of every job, in seconds."""
        return self._each(lambda s: s.to_first_token)

    def per_output_token(self) -> Times:
        """TPOT of every job with more than one output token, in seconds."""
        return np.array([s.per_output_token for s in self.served if s.job.output_tokens > 1])

    def normalized(self) -> Times:
        """Seconds per output token, waiting included, of every job."""
        return self._each(lambda s: s.normalized)

    def gaps(self) -> Times:
        """All gaps between consecutive tokens, in seconds. Raises ValueError if the run did not
        keep token times."""
        found = []
        for served in self.served:
            if served.token_times is None:
                raise ValueError("this run kept no token times")
            found.append(np.diff(np.array(served.token_times)))
        return np.concatenate(found) if found else np.empty(0)

    # -- Of the run ------------------------------------------------------------------------

    def mean_completion(self) -> float:
        """Mean JCT."""
        return float(self.completion().mean())

    def completion_percentile(self, percent: float) -> float:
        """E.g. 99 for P99 JCT."""
        return float(np.percentile(self.completion(), percent))

    def mean_normalized(self) -> float:
        """Mean seconds per output token, waiting included."""
        return float(self.normalized().mean())

    def gap_percentile(self, percent: float) -> float:
        """Of the gaps between consecutive tokens of all jobs."""
        return float(np.percentile(self.gaps(), percent))

    def output_tokens(self) -> int:
        """Output tokens of all jobs in `served`."""
        return sum(s.job.output_tokens for s in self.served)

    def throughput(self) -> float:
        """Output tokens per second over the makespan."""
        return self.output_tokens() / self.makespan if self.makespan else 0.0

    def completion_rate(self) -> float:
        """Completions per second in the middle 80% of them: the steady saturation rate, if the
        run was backlogged. Raises ValueError with fewer than 20 jobs."""
        times = np.sort(self._each(lambda s: s.finished_at))
        if len(times) < 20:
            raise ValueError("too few jobs for a steady rate")
        low, high = int(0.1 * len(times)), int(0.9 * len(times)) - 1
        return float((high - low) / (times[high] - times[low]))

    def attained(self, *, ttft: float | None = None, tpot: float | None = None) -> float:
        """Share of the jobs that met every given limit (seconds)."""
        if not self.served:
            return 0.0
        return self._meeting(ttft, tpot) / len(self.served)

    def goodput(self, *, ttft: float | None = None, tpot: float | None = None) -> float:
        """Jobs per second of the makespan that met every given limit."""
        return self._meeting(ttft, tpot) / self.makespan if self.makespan else 0.0

    def _meeting(self, ttft: float | None, tpot: float | None) -> int:
        return sum(
            (ttft is None or s.to_first_token <= ttft)
            and (tpot is None or s.per_output_token <= tpot)
            for s in self.served
        )

    def _each(self, value: Callable[[Served], float]) -> Times:
        return np.array([value(s) for s in self.served])
