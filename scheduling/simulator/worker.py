"""One simulated decode worker: the real scheduler, a cost model, and the books of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, field

from baton.errors import InvalidRequest, Overloaded
from baton.types import Output
from scheduling.cost import CostTracker, LinearCost
from scheduling.decode import DecodeScheduler
from scheduling.order import Policy
from scheduling.plan import Capacity, StepPlan, StepResult
from scheduling.routing import Candidate
from scheduling.rules import Rules
from scheduling.sequence import Sequence
from scheduling.simulator.executor import CostExecutor
from scheduling.simulator.outcome import Served, Tally
from scheduling.simulator.traffic import PLAIN, Job

_NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a simulated worker is made of. `policy` builds a fresh order per worker; the tracker
    that it gets holds `cost` and never changes, as if the engine had been measured for long.
    `swap_seconds_per_block`: each way."""

    capacity: Capacity
    cost: LinearCost
    policy: Callable[[CostTracker], Policy]
    rules: Rules = field(default_factory=Rules)
    swap_seconds_per_block: float = 0.0
    max_waiting: int = _NO_LIMIT


@dataclass(slots=True)
class _Live:
    """A job on this worker."""

    job: Job
    sequence: Sequence
    first_token_at: float | None = None
    token_times: list[float] | None = None


@dataclass(slots=True)
class _Pass:
    """What runs now."""

    plan: StepPlan
    result: StepResult
    begins: float
    ends: float


class SimulatedWorker:
    """Drives a DecodeScheduler through virtual time, pass by pass:

        ends = worker.begin(now)      # None: nothing to run
        ... submit, until `ends` ...
        served = worker.end()

    The caller keeps the clock and never goes back.
    """

    def __init__(self, spec: WorkerSpec, *, keep_token_times: bool = False) -> None:
        tracker = CostTracker(spec.cost, every=0)
        self.spec = spec
        self.scheduler = DecodeScheduler(
            spec.capacity,
            spec.policy(tracker),
            max_waiting=spec.max_waiting,
            rules=spec.rules,
            cost=tracker,
        )
        self.executor = CostExecutor(spec.cost, swap_seconds_per_block=spec.swap_seconds_per_block)
        self.steps = 0
        self.busy_seconds = 0.0
        self.peak_kv_tokens = 0
        self.expected_tokens = 0  # output, of the jobs that are here, as was estimated
        self._keep_token_times = keep_token_times
        self._live: dict[str, _Live] = {}
        self._pass: _Pass | None = None
        self._kv_tokens = 0
        self._preemptions = 0

    # -- Jobs come -------------------------------------------------------------------------

    def submit(self, job: Job, now: float) -> bool:
        """Take a job whose prompt is computed here. False if the worker refuses it."""
        try:
            (sequence,) = self.scheduler.submit(job.request(), now)
        except (InvalidRequest, Overloaded):
            return False
        self._take(job, sequence)
        return True

    def reserve(self, job: Job, now: float) -> bool:
        """Hold room for a job whose KV comes from elsewhere: `arrived` or `abandon` must follow.
        False if there is none now, or ever."""
        try:
            sequence = self.scheduler.reserve(job.request(), now)
        except (InvalidRequest, Overloaded):
            return False
        self._take(job, sequence)
        return True

    def arrived(self, job: Job, first_token_at: float, now: float) -> None:
        """The KV of its prompt is here. The client has had the first token since
        `first_token_at`, and it was not the last."""
        live = self._live[job.id]
        self._note(live, first_token_at)
        self.scheduler.arrived(live.sequence, PLAIN, now)
        self._kv_tokens += job.prompt_tokens
        self.peak_kv_tokens = max(self.peak_kv_tokens, self._kv_tokens)

    def abandon(self, job: Job, now: float) -> None:
        """The KV that room was reserved for will not come: the job has ended elsewhere."""
        live = self._live.pop(job.id)
        self.executor.forget(live.sequence)
        self.expected_tokens -= _expected(job)
        self.scheduler.abort(job.id, now)
        self.scheduler.quiet(live.sequence)

    def _take(self, job: Job, sequence: Sequence) -> None:
        times: list[float] | None = [] if self._keep_token_times else None
        self._live[job.id] = _Live(job, sequence, token_times=times)
        self.executor.expect(sequence, job.output_tokens)
        self.expected_tokens += _expected(job)

    @property
    def busy(self) -> bool:
        """True while a pass runs."""
        return self._pass is not None

    @property
    def jobs(self) -> int:
        """Jobs that have not ended."""
        return len(self._live)

    # -- Passes ----------------------------------------------------------------------------

    def begin(self, now: float) -> float | None:
        """Start the next pass; returns when it ends, or None if nothing can run now."""
        plan = self.scheduler.plan(now)
        if plan is None:
            return None
        result = self.executor.execute(plan, now)
        self._pass = _Pass(plan, result, now, now + result.seconds)
        return self._pass.ends

    def end(self) -> list[Served]:
        """The pass is over: returns the jobs that ended with it."""
        done = self._pass
        assert done is not None
        self._pass = None
        events = self.scheduler.apply(done.plan, done.result, done.ends)
        self.steps += 1
        self.busy_seconds += done.result.seconds
        self._count_kv(done.plan)
        served = []
        for event in events:
            if isinstance(event, Output):
                live = self._live[event.request_id]
                self._note(live, done.ends)
                if event.finish is not None:
                    served.append(self._finish(live, done.ends))
        return served

    def _note(self, live: _Live, now: float) -> None:
        if live.first_token_at is None:
            live.first_token_at = now
        if live.token_times is not None:
            live.token_times.append(now)

    def _finish(self, live: _Live, now: float) -> Served:
        job = live.job
        del self._live[job.id]
        self.executor.forget(live.sequence)
        self._kv_tokens -= job.prompt_tokens + job.output_tokens - 1
        self.expected_tokens -= _expected(job)
        assert live.first_token_at is not None
        return Served(
            job,
            live.first_token_at,
            now,
            live.sequence.preemptions,
            None if live.token_times is None else tuple(live.token_times),
        )

    # -- Facts -----------------------------------------------------------------------------

    def tally(self) -> Tally:
        """Counters since the start."""
        counters = self.scheduler.counters
        return Tally(
            preemptions=self.scheduler.preemptions,
            recomputed=counters.recomputed,
            swapped_out=counters.swapped_out,
            swapped_in=counters.swapped_in,
            swapped_blocks=counters.blocks_out + counters.blocks_in,
            mispredictions=counters.mispredictions,
        )

    def candidate(self, name: str) -> Candidate:
        """What a router sees of it, under this name."""
        load = self.scheduler.load()
        return Candidate(
            name,
            sequences=len(self._live),
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
            outstanding_tokens=self.expected_tokens,
        )

    def _count_kv(self, plan: StepPlan) -> None:
        """Tokens whose KV is held, before anything that ended in this pass lets go of it."""
        self._kv_tokens += plan.tokens
        if self.scheduler.preemptions != self._preemptions:
            self._preemptions = self.scheduler.preemptions
            self._kv_tokens = sum(live.sequence.computed for live in self._live.values())
        self.peak_kv_tokens = max(self.peak_kv_tokens, self._kv_tokens)


def sum_tallies(tallies: Iterable[Tally]) -> Tally:
    """The counters of several workers together."""
    columns = zip(*(astuple(tally) for tally in tallies), strict=True)
    return Tally(*(sum(column) for column in columns))


def _expected(job: Job) -> int:
    """Output tokens that a router may count on: the cap, if nothing was estimated."""
    return job.max_tokens if job.estimate is None else job.estimate.tokens
