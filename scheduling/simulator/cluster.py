"""A whole cluster: the gateways' queue, prefill workers, KV on its way, decode workers.

What runs where and when is decided by the workers' own schedulers, the gateway's routers and the
order of its queue (queue.py). What is modelled here is time: passes by a cost model, KV transfers
by bandwidth and latency. What the gateway does between them takes none. A job whose deadline passes
while it waits is rejected; one that a worker has runs to its end.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from scheduling.routing import cached_that_count, make_router
from scheduling.simulator.outcome import Outcome, Served
from scheduling.simulator.prefill_worker import HandedOff, SimulatedPrefillWorker, Transfer
from scheduling.simulator.prefixes import KnownPrefixes
from scheduling.simulator.queue import QueueOrder, WaitingQueue
from scheduling.simulator.ranking import Ranking
from scheduling.simulator.traffic import Job, OpenLoop, Source
from scheduling.simulator.worker import SimulatedWorker, WorkerSpec, sum_tallies

_Worker = SimulatedWorker | SimulatedPrefillWorker


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What the cluster is made of. Without prefill workers the decode workers prefill.

    Late binding: a prefill worker holds at most `ahead_passes` passes' worth of prompts, a decode
    worker at most `ahead_sequences` more than fit its batch; the rest waits in the queue. Only of
    a tenant that has less than its share of these places there, a decode worker takes more.
    `local_prefill_tokens` as in GatewayConfig. No job is held for a worker that has its prompt.
    """

    decode: WorkerSpec
    decode_workers: int = 1
    prefill: WorkerSpec | None = None
    prefill_workers: int = 0
    transfer: Transfer = field(default_factory=lambda: Transfer(1, float("inf")))
    queue: QueueOrder = field(default_factory=QueueOrder)
    routing: str = "kv-aware"
    ahead_passes: int = 4
    ahead_sequences: int = 8
    local_prefill_tokens: int = 256

    def __post_init__(self) -> None:
        if self.decode_workers < 1 or bool(self.prefill_workers) != (self.prefill is not None):
            raise ValueError("a cluster needs decode workers, and a spec for prefill workers")


def simulate_cluster(
    jobs: Iterable[Job] | Source,
    spec: ClusterSpec,
    *,
    keep_token_times: bool = False,
    strides: bool = True,
) -> Outcome:
    """Serve all jobs. Deterministic. Without `strides` slower; the same, but that routers which
    look at free blocks see a worker as it was when its stride began.

    Raises RuntimeError if everything stands still while jobs are left.
    """
    source = jobs if isinstance(jobs, Source) else OpenLoop(jobs)
    return _Cluster(source, spec, keep_token_times, strides).to_the_end()


class _Cluster:
    """The event loop. An event is a time and what to do then."""

    def __init__(
        self, source: Source, spec: ClusterSpec, keep_token_times: bool, strides: bool
    ) -> None:
        self._spec = spec
        self._source = source
        self._initial = iter(source.start())
        prefill = spec.prefill or spec.decode
        self._queue = WaitingQueue(spec.queue.measured(prefill.cost, spec.decode.cost))
        self._decode = {
            f"decode-{i:03d}": SimulatedWorker(
                spec.decode, keep_token_times=keep_token_times, strides=strides
            )
            for i in range(spec.decode_workers)
        }
        self._prefill = {
            f"prefill-{i:03d}": SimulatedPrefillWorker(spec.prefill, spec.transfer)
            for i in range(spec.prefill_workers)
            if spec.prefill is not None
        }
        most = spec.decode.capacity.max_sequences + spec.ahead_sequences
        self._to_decode = Ranking(
            make_router(spec.routing), self._decode, lambda worker: worker.jobs < most
        )
        self._places = most
        self._to_share = Ranking(make_router(spec.routing), self._decode, lambda worker: True)
        self._ahead = spec.ahead_passes * spec.prefill.capacity.max_tokens if spec.prefill else 0
        self._to_prefill = Ranking(
            make_router(spec.routing),
            self._prefill,
            lambda worker: not worker.jobs or worker.queued_tokens < self._ahead,
        )
        workers: dict[str, _Worker] = {**self._decode, **self._prefill}
        self._names = {worker: name for name, worker in workers.items()}
        self._prefixes = KnownPrefixes(
            {name: worker.spec for name, worker in workers.items()},
            enabled=spec.routing == "prefix-aware",
        )
        self._placed: dict[str, SimulatedWorker] = {}  # job id to where it decodes
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._number = 0
        self._woken: dict[_Worker, None] = {}  # may have something to run, or run less long
        self._due: dict[_Worker, float] = {}  # when what runs there ends
        self._served: list[Served] = []
        self._rejected = 0

    def to_the_end(self) -> Outcome:
        """Run until nothing is left."""
        self._await_arrival()
        while self._events:
            now = self._events[0][0]
            while self._events and self._events[0][0] == now:
                heapq.heappop(self._events)[2](now)
            self._settle(now)
        if self._queue or any(worker.jobs for worker in self._decode.values()):
            raise RuntimeError("jobs are left and nothing can run")
        decode = self._decode.values()
        engines: list[_Worker] = [*decode, *self._prefill.values()]
        return Outcome(
            served=tuple(self._served),
            makespan=max((s.finished_at for s in self._served), default=0.0),
            steps=sum(w.steps for w in engines),
            busy_seconds=sum(w.busy_seconds for w in engines),
            stall_seconds=sum(w.executor.stall_seconds for w in decode),
            peak_kv_tokens=max(w.peak_kv_tokens for w in decode),
            rejected=self._rejected,
            tally=sum_tallies(w.tally() for w in engines),
        )

    def _settle(self, now: float) -> None:
        """All that happens now has happened: place what waits, start passes."""
        self._dispatch(now)
        for worker in self._woken:
            self._note_change(worker)
            ends = worker.ends if worker.ends is not None else worker.begin(now)
            if ends is not None and ends != self._due.get(worker):
                self._due[worker] = ends
                self._at(ends, self._end_of_pass(worker))
        self._woken.clear()

    def _wake(self, worker: _Worker) -> None:
        """Something has happened there."""
        self._woken[worker] = None
        self._note_change(worker)

    def _note_change(self, worker: _Worker) -> None:
        if isinstance(worker, SimulatedWorker):
            self._to_decode.touch(worker)
            self._to_share.touch(worker)
        else:
            self._to_prefill.touch(worker)

    def _at(self, time: float, act: Callable[[float], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, act))

    # -- Arrivals --------------------------------------------------------------------------

    def _await_arrival(self) -> None:
        """The next job of those that depend on nobody."""
        job = next(self._initial, None)
        if job is None:
            return

        def arrive(now: float) -> None:
            self._push(job)
            self._await_arrival()

        self._at(job.arrived_at, arrive)

    def _push(self, job: Job) -> None:
        self._prefixes.came(job)
        self._queue.push(job, max(self._cached(job).values(), default=0))

    def _cached(self, job: Job) -> Mapping[str, int]:
        """As Placing.cached of the gateway."""
        cached = self._prefixes.cached(job)
        if not cached or not self._prefill:
            return cached
        least = job.prompt_tokens - self._spec.local_prefill_tokens
        places = self._spec.decode.capacity.max_sequences
        return cached_that_count(
            cached, least, self._prefill, lambda name: self._decode[name].jobs < places
        )

    def _ended(self, served: Served, now: float) -> None:
        self._served.append(served)
        self._prefixes.ended(served.job, self._names[self._placed.pop(served.job.id)])
        self._queue.end(served.job, served.job.output_tokens)
        self._cause(served.job, now)

    def _cause(self, job: Job, now: float) -> None:
        following = self._source.finished(job, now)
        if following is not None:
            self._at(following.arrived_at, lambda at: self._push(following))

    # -- Dispatch --------------------------------------------------------------------------

    def _dispatch(self, now: float) -> None:
        """Give away the head of the queue for as long as somebody takes it."""
        if now >= self._queue.sweep_at:
            for job in self._queue.tick(now):
                self._reject(job, now)
        while (head := self._queue.first(now)) is not None:
            if not self._fits_ever(head):
                self._queue.end(head)
                self._reject(head, now)
            elif self._place(head, now, self._decode_for(head)):
                self._queue.claim(head)
            else:
                break
        while (owed := self._first_owed(now)) is not None:
            if not self._place(owed, now, self._owing(owed)):
                return
            self._queue.claim(owed)

    def _first_owed(self, now: float) -> Job | None:
        """The first one that waits, whose tenant has less than its share of the places of some
        decode worker, if there are several tenants."""
        if self._queue.tenants < 2:
            return None
        workers, share = self._decode.values(), self._share()
        owed = [
            tenant
            for tenant in self._queue.waiting_tenants
            if any(worker.jobs_of(tenant) < share for worker in workers)
        ]
        return self._queue.first_of(owed, now) if owed else None

    def _share(self) -> int:
        """Places of a decode worker for each tenant."""
        return max(1, self._places // self._queue.tenants)

    def _owing(self, job: Job) -> Iterator[SimulatedWorker]:
        """Decode workers on which its tenant has less than its share, best first."""
        share = self._share()
        ranked = self._to_share.best_first(self._blocks_for(job), self._cached(job))
        return (worker for worker in ranked if worker.jobs_of(job.tenant) < share)

    def _reject(self, job: Job, now: float) -> None:
        self._rejected += 1
        self._prefixes.rejected(job)
        self._cause(job, now)

    def _fits_ever(self, job: Job) -> bool:
        total = job.prompt_tokens + job.max_tokens
        return total <= self._spec.decode.capacity.longest_sequence

    def _place(self, job: Job, now: float, workers: Iterator[SimulatedWorker]) -> bool:
        """Give it to the first of these decode workers that takes it, if any does."""
        if not self._prefill:
            return self._place_whole(job, now, workers)
        cached = self._cached(job)
        helper = self._prefill_for(job, cached)
        for worker in workers:
            if self._names[worker] in cached:
                return self._place_whole(job, now, iter((worker,)))
            if helper is None:
                return False
            self._wake(worker)
            if worker.reserve(job, now):
                if not helper.submit(job, now):
                    worker.abandon(job, now)
                    return False
                self._put(job, worker)
                self._prefixes.sent(job, self._names[helper])
                self._wake(helper)
                return True
        return False

    def _put(self, job: Job, worker: SimulatedWorker) -> None:
        self._placed[job.id] = worker
        self._prefixes.sent(job, self._names[worker])

    def _place_whole(self, job: Job, now: float, workers: Iterator[SimulatedWorker]) -> bool:
        for worker in workers:
            self._wake(worker)
            if worker.submit(job, now):
                self._put(job, worker)
                return True
        return False

    def _decode_for(self, job: Job) -> Iterator[SimulatedWorker]:
        """Decode workers that may take one more, best first."""
        return self._to_decode.best_first(self._blocks_for(job), self._cached(job))

    def _blocks_for(self, job: Job) -> int:
        expected = job.prompt_tokens + (job.estimate.tokens if job.estimate else 0)
        return self._spec.decode.capacity.blocks_for(expected)

    def _prefill_for(self, job: Job, cached: Mapping[str, int]) -> SimulatedPrefillWorker | None:
        """The best prefill worker that has room for the prompt ahead of its passes; an idle one
        takes any."""
        assert self._spec.prefill is not None
        blocks = self._spec.prefill.capacity.blocks_for(job.prompt_tokens)
        for worker in self._to_prefill.best_first(blocks, cached):
            uncached = job.prompt_tokens - cached.get(self._names[worker], 0)
            if not worker.jobs or worker.queued_tokens + uncached <= self._ahead:
                return worker
        return None

    # -- Passes ----------------------------------------------------------------------------

    def _end_of_pass(self, worker: _Worker) -> Callable[[float], None]:
        def ended(now: float) -> None:
            if self._due.get(worker) != now:
                return  # brought forward meanwhile
            del self._due[worker]
            self._wake(worker)
            if isinstance(worker, SimulatedWorker):
                for served in worker.end():
                    self._ended(served, now)
            else:
                for done in worker.end():
                    self._prefilled(worker, done, now)

        return ended

    def _prefilled(self, helper: SimulatedPrefillWorker, done: HandedOff, now: float) -> None:
        if done.job.output_tokens == 1:
            worker = self._placed[done.job.id]
            worker.abandon(done.job, now)
            self._wake(worker)
            helper.release(done.blocks)
            self._ended(Served(done.job, now, now), now)
        else:
            self._await_kv(helper, done, now)

    def _await_kv(
        self, helper: SimulatedPrefillWorker, done: HandedOff, first_token: float
    ) -> None:
        worker = self._placed[done.job.id]

        def arrive(now: float) -> None:
            helper.release(done.blocks)
            worker.arrived(done.job, first_token, now)
            self._wake(worker)
            self._wake(helper)

        self._at(done.kv_at, arrive)
