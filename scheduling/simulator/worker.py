"""One simulated decode worker: the real scheduler, a cost model, and the books of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import astuple, dataclass, field

from baton.errors import InvalidRequest, Overloaded
from baton.prefix import block_keys
from baton.types import Output
from scheduling.cost import CostTracker, LinearCost
from scheduling.events import DecodeEvent
from scheduling.order import Policy
from scheduling.plan import Capacity, StepPlan, StepResult
from scheduling.prefix import BlockKeys
from scheduling.routing import Candidate
from scheduling.rules import Rules
from scheduling.sequence import Sequence
from scheduling.simulator.executor import CostExecutor
from scheduling.simulator.outcome import Served, Tally
from scheduling.simulator.stride import Stride
from scheduling.simulator.traffic import PLAIN, Job
from scheduling.striding import StridingScheduler

_NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a simulated worker is made of. `policy` builds a fresh order per worker; the tracker
    that it gets holds `cost` and never changes, as if the engine had been measured for long.
    `swap_seconds_per_block`: each way. A `prefix_cache` is for jobs with prompt ids: all others
    begin alike."""

    capacity: Capacity
    cost: LinearCost
    policy: Callable[[CostTracker], Policy]
    rules: Rules = field(default_factory=Rules)
    swap_seconds_per_block: float = 0.0
    max_waiting: int = _NO_LIMIT
    prefix_cache: bool = False

    @property
    def block_keys(self) -> BlockKeys | None:
        """For its scheduler."""
        return block_keys if self.prefix_cache else None


@dataclass(slots=True)
class _Live:
    """A job on this worker."""

    job: Job
    sequence: Sequence
    first_token_at: float | None = None
    token_times: list[float] | None = None


@dataclass(slots=True)
class _Pass:
    """What runs now: one pass, or several of the same sequences in a row."""

    plan: StepPlan
    begins: float
    ends: float
    swapped: tuple[int, ...]  # swaps that are complete when the first pass ends
    passes: int = 1
    stride: Stride | None = None  # how long they take, if they are several
    ending: int = 1  # passes until the first of the sequences ends


class SimulatedWorker:
    """Drives a StridingScheduler through virtual time, a pass or a stride of them at a time:

        ends = worker.begin(now)      # None: nothing to run
        ... submit, until `ends` ...
        served = worker.end()

    The caller keeps the clock and never goes back.
    """

    def __init__(
        self, spec: WorkerSpec, *, keep_token_times: bool = False, strides: bool = True
    ) -> None:
        """Without `strides` every pass is planned by itself: the same outcome, but slow."""
        tracker = CostTracker(spec.cost, every=0)
        self.spec = spec
        self.scheduler = StridingScheduler(
            spec.capacity,
            spec.policy(tracker),
            max_waiting=spec.max_waiting,
            rules=spec.rules,
            cost=tracker,
            block_keys=spec.block_keys,
        )
        self.executor = CostExecutor(spec.cost, swap_seconds_per_block=spec.swap_seconds_per_block)
        self.steps = 0
        self.busy_seconds = 0.0
        self.peak_kv_tokens = 0
        self.expected_tokens = 0  # output, of the jobs that are here, as was estimated
        self._strides = strides
        self._keep_token_times = keep_token_times
        self._live: dict[str, _Live] = {}
        self._tenants: Counter[str] = Counter()  # of the jobs that are here
        self._candidate: Candidate | None = None
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
        self._shorten(now, sequence)
        self._take(job, sequence)
        return True

    def reserve(self, job: Job, now: float) -> bool:
        """Hold room for a job whose KV comes from elsewhere: `arrived` or `abandon` must follow.
        False if there is none now, or ever."""
        if not self._has_plenty(job):
            self._catch_up(now)
        try:
            sequence = self.scheduler.reserve(job.request(), now)
        except (InvalidRequest, Overloaded):
            return False
        self._take(job, sequence)
        return True

    def arrived(self, job: Job, first_token_at: float, now: float) -> None:
        """The KV of its prompt is here. The client has had the first token since
        `first_token_at`, and it was not the last."""
        self._candidate = None
        self._shorten(now)
        live = self._live[job.id]
        self._note(live, [first_token_at])
        self.scheduler.arrived(live.sequence, PLAIN, now)
        self._kv_tokens += job.prompt_tokens
        self.peak_kv_tokens = max(self.peak_kv_tokens, self._kv_tokens)

    def abandon(self, job: Job, now: float) -> None:
        """The KV that room was reserved for will not come: the job has ended elsewhere."""
        self._candidate = None
        self._catch_up(now)
        live = self._live.pop(job.id)
        self._tenants[job.tenant] -= 1
        self.executor.forget(live.sequence)
        self.expected_tokens -= _expected(job)
        self.scheduler.abort(job.id, now)
        self.scheduler.quiet(live.sequence)

    def _take(self, job: Job, sequence: Sequence) -> None:
        self._candidate = None
        times: list[float] | None = [] if self._keep_token_times else None
        self._live[job.id] = _Live(job, sequence, token_times=times)
        self._tenants[job.tenant] += 1
        self.executor.expect(sequence, job.output_tokens)
        self.expected_tokens += _expected(job)

    @property
    def ends(self) -> float | None:
        """When what runs now ends, None if nothing does. Whatever comes from outside may bring
        it forward."""
        return None if self._pass is None else self._pass.ends

    @property
    def jobs(self) -> int:
        """Jobs that have not ended."""
        return len(self._live)

    def jobs_of(self, tenant: str) -> int:
        """Those of one tenant."""
        return self._tenants[tenant]

    # -- Passes ----------------------------------------------------------------------------

    def begin(self, now: float) -> float | None:
        """Start what can run; returns when it ends, or None if nothing can."""
        self._candidate = None
        plan = self.scheduler.plan(now)
        if plan is None:
            return None
        self._pass = running = self._run(plan, now)
        if self._strides:
            self._lengthen(running)
        return running.ends

    def end(self) -> list[Served]:
        """What runs is over: returns the jobs that ended with it."""
        self._candidate = None
        done = self._pass
        assert done is not None
        self._pass = None
        if done.stride is not None:
            return self._apply_stride(done, done.stride, done.passes, done.ends)
        seconds, sampled = done.ends - done.begins, self.executor.sample(done.plan)
        result = StepResult(sampled, ((),) * len(sampled), seconds, done.swapped)
        events = self.scheduler.apply(done.plan, result, done.ends)
        self._count(1, seconds, done.plan.tokens)
        for event in events:
            if isinstance(event, Output):
                self._note(self._live[event.request_id], (done.ends,))
        return self._ended(events, done.ends)

    def _run(self, plan: StepPlan, now: float) -> _Pass:
        ends = self.executor.run(plan, now)
        return _Pass(plan, now, ends, self.executor.link.ended(ends))

    def _ended(self, events: Iterable[DecodeEvent], now: float) -> list[Served]:
        """The jobs whose last token is among `events`."""
        return [
            self._finish(self._live[event.request_id], now)
            for event in events
            if isinstance(event, Output) and event.finish is not None
        ]

    # -- Strides ---------------------------------------------------------------------------

    def _lengthen(self, running: _Pass) -> None:
        """Take in the passes that will follow with the same sequences, up to the first that ends
        somebody or a swap."""
        plan, link = running.plan, self.executor.link
        most = running.ending = self.executor.shortest(plan)
        if most < 2 or plan.swap_out or plan.swap_in or running.swapped:
            return
        stride = Stride.of(plan, running.ends - running.begins, self.spec.cost)
        if (swapped_at := link.next_end()) is not None:
            most = min(most, stride.begun_by(swapped_at - running.begins) - 1)
        if most > 1:
            passes = self.scheduler.stride(plan, running.begins, stride.last(most), most)
            if passes > 1:
                running.stride, running.passes = stride, passes
                running.ends = running.begins + stride.seconds(passes)

    def _shorten(self, now: float, newcomer: Sequence | None = None) -> None:
        """Somebody is here who can run: of several passes, the one that is under way is the last,
        or a later one if it is a newcomer whose turn has not come."""
        running = self._pass
        if running is None or running.stride is None:
            return
        stride, passes = running.stride, 1
        if newcomer is not None:
            passes = self.scheduler.stride_before(
                running.plan, newcomer, running.begins, stride.last(running.passes), running.passes
            )
        if passes < running.passes:
            running.passes = max(passes, stride.begun_by(now - running.begins))
            running.ends = running.begins + stride.seconds(running.passes)

    def _has_plenty(self, job: Job) -> bool:
        """Whether a reservation takes nothing that the passes of a stride could want: then it is
        the same now as at the boundary before the pass that is under way."""
        running, spec = self._pass, self.spec
        if running is None or running.stride is None:
            return True
        if spec.rules.admission != "paged" or self.scheduler.swaps:
            return False
        wanted = len(running.plan.chunks) * spec.capacity.blocks_for(running.passes)
        wanted += spec.capacity.max_sequences  # what is left over for those that run
        wanted += spec.capacity.blocks_for(job.prompt_tokens + 1)
        return wanted <= self.scheduler.free_blocks

    def _catch_up(self, now: float) -> None:
        """Something asks for blocks: of several passes, those before the one that is under way
        are over, and that one is alone."""
        running = self._pass
        if running is None or running.stride is None:
            return
        stride = running.stride
        over = stride.begun_by(now - running.begins) - 1
        boundary = running.begins + stride.seconds(over)
        if over:
            seconds = stride.seconds(over)
            plan = self.scheduler.advance(running.plan, over, PLAIN, seconds, boundary)
            self._count(over, seconds, over * len(plan.chunks))
            self._note_times(running, over)
            self._pass = self._run(plan, boundary)
        else:
            running.ends = boundary + stride.seconds(1)
            running.stride, running.passes = None, 1

    def _apply_stride(self, done: _Pass, stride: Stride, passes: int, now: float) -> list[Served]:
        plan, seconds = done.plan, stride.seconds(passes)
        last = self.executor.after(plan, passes) if passes >= done.ending else None
        events = self.scheduler.apply_stride(plan, passes, PLAIN, seconds, now, last)
        self._count(passes, seconds, passes * len(plan.chunks))
        self._note_times(done, passes)
        return self._ended(events, now)

    def _note_times(self, done: _Pass, passes: int) -> None:
        """Every sequence of a stride has got a token in each of so many passes."""
        if self._keep_token_times and done.stride is not None:
            times = done.stride.ends(done.begins, passes)
            for chunk in done.plan.chunks:
                self._note(self._live[chunk.sequence.request.id], times)

    # -- Books -----------------------------------------------------------------------------

    def _note(self, live: _Live, times: Items[float]) -> None:
        if live.first_token_at is None:
            live.first_token_at = times[0]
        if live.token_times is not None:
            live.token_times += times

    def _finish(self, live: _Live, now: float) -> Served:
        job = live.job
        del self._live[job.id]
        self._tenants[job.tenant] -= 1
        self.executor.forget(live.sequence)
        self._kv_tokens -= job.prompt_tokens + job.output_tokens - 1 - live.sequence.cached
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
            prompt_tokens=self.executor.prompt_tokens,
        )

    def candidate(self, name: str) -> Candidate:
        """What a router sees of it, under this name; the same until something happens here."""
        if self._candidate is None:
            load = self.scheduler.load()
            self._candidate = Candidate(
                name,
                sequences=len(self._live),
                free_blocks=load.free_blocks,
                total_blocks=load.total_blocks,
                outstanding_tokens=self.expected_tokens,
                slots=self.spec.capacity.max_sequences,
            )
        return self._candidate

    def _count(self, passes: int, seconds: float, tokens: int) -> None:
        """Passes are over, before anything that ended with them lets go of its KV."""
        self.steps += passes
        self.busy_seconds += seconds
        self._kv_tokens += tokens
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
