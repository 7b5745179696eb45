"""Drives one engine for all gateways: prompts in, leases on KV and first tokens out."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from baton.errors import BatonError, EngineFailed, Overloaded, Unavailable
from baton.types import Claim, KvRef, Load, Request
from engine.executor import Executor
from engine.loop import EngineLoop
from engine.metrics import EngineMetrics
from kv_transfer.contract import Producer
from prefill_worker.job import Job
from queueing.contract import Progress, Verdict
from scheduling.events import PrefillAdvanced, Prefilled, PrefillEvent, PrefillStarted
from scheduling.plan import StepPlan
from scheduling.prefill import PrefillScheduler

log = logging.getLogger(__name__)


class PrefillWorker:
    """Jobs over a PrefillScheduler. Everything here runs on the event loop; the scheduler is the
    engine's thread's, too, and touched under the engine's lock.

    Blocks: the scheduler's until PrefillStarted; then they lie under a lease, and the producer
    says `on_freed` when that has ended and nobody reads them. The prefill goes on without a lease,
    for its first token, and until its end its blocks are nobody else's.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: PrefillScheduler,
        producer: Producer,
        metrics: EngineMetrics,
        *,
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        """`on_idle` as in EngineLoop."""
        self._scheduler = scheduler
        self._block_size = executor.capacity.block_size
        self._producer = producer
        self._metrics = metrics
        self._jobs: dict[str, Job] = {}  # not complete; by the scheduler's request id
        self._leased: dict[bytes, Job] = {}  # whose blocks are under lease, by lease id
        self._calls = 0
        self.draining = False
        self.engine = EngineLoop(scheduler, executor, self._on_events, on_idle=on_idle)

    # What gateways ask.

    async def prefill(
        self, request: Request, claim: Claim
    ) -> AsyncGenerator[KvRef | Prefilled, None]:
        """Run one prefill: a KvRef as soon as there are blocks, then a Prefilled; the end comes
        when the lease has ended.

        Closing the iterator stops the work and revokes the lease: whoever asked for it is the
        only one who could send a decode worker for it. Raises InvalidRequest and Overloaded.
        """
        if self.draining:
            raise Unavailable("this worker is shutting down")
        self._calls += 1
        # Unique here even while an earlier attempt at the same request is still being cleared.
        job = Job(request.id, replace(request, id=f"{request.id}/{self._calls}"), claim)
        with self.engine.lock:
            job.level = self._scheduler.submit(job.request, time.monotonic()).level
        self._jobs[job.request.id] = job
        self.engine.wake()
        try:
            while True:
                news = await job.news.get()
                if isinstance(news, Exception):
                    raise news
                yield news
                if isinstance(news, Prefilled):
                    break
            await job.freed.wait()
        finally:
            self._drop(job)

    # The engine's news.

    def _on_events(self, plan: StepPlan, events: list[PrefillEvent], seconds: float) -> None:
        self._metrics.step(plan, seconds)
        for chunk in plan.chunks:
            if job := self._jobs.get(chunk.sequence.request.id):
                job.served += seconds
                self._metrics.level(job.level, chunk.sequence.level)
                job.level = chunk.sequence.level
        for event in events:
            match event:
                case PrefillStarted(sequence):
                    if job := self._jobs.get(sequence.request.id):
                        self._started(job, sequence.blocks)
                    else:
                        self._release(sequence.blocks)
                case PrefillAdvanced(sequence, computed):
                    # Aborted since the pass, if it has no job.
                    if job := self._jobs.get(sequence.request.id):
                        self._producer.advance(job.lease, computed // self._block_size)
                case Prefilled(sequence):
                    if job := self._jobs.get(sequence.request.id):
                        self._complete(job, event)
                case _:
                    if job := self._jobs.get(event.request_id):
                        self._fail(job, EngineFailed("the engine failed"))
        with self.engine.lock:
            prefixes = self._scheduler.prefixes
        self._metrics.prefixes(prefixes)
        self._metrics.load(self.load())

    def _started(self, job: Job, blocks: list[int]) -> None:
        try:
            ref = self._producer.publish(blocks, len(job.request.prompt_ids) + job.prior_tokens)
        except Overloaded as error:
            self._release(blocks)
            self._fail(job, error)
            return
        self._leased[ref.lease_id] = job
        job.lease, job.blocks = ref.lease_id, blocks
        job.news.put_nowait(ref)

    def _complete(self, job: Job, event: Prefilled) -> None:
        del self._jobs[job.request.id]
        self._release_if_done(job)
        if event.output.finish is None:
            self._producer.seal(job.lease)
        else:
            self._producer.revoke(job.lease)  # nobody will decode: the first token was the last
        job.news.put_nowait(event)

    def on_freed(self, lease_id: bytes) -> None:
        """Nobody reads the blocks of a lease any more."""
        job = self._leased.pop(lease_id)
        job.freed.set()
        self._release_if_done(job)
        self._metrics.load(self.load())
        self.engine.wake()

    def _release_if_done(self, job: Job) -> None:
        """Give back blocks that are neither under a lease nor written to by passes to come."""
        if job.freed.is_set() and job.request.id not in self._jobs:
            self._release(job.blocks)

    def _release(self, blocks: list[int]) -> None:
        with self.engine.lock:
            self._scheduler.release(blocks)

    # The end, and what others need to know.

    def _fail(self, job: Job, error: BatonError) -> None:
        self._drop(job)
        job.news.put_nowait(error)

    def _drop(self, job: Job) -> None:
        """Forget a job, stop its work and end its lease. Idempotent."""
        if self._jobs.pop(job.request.id, None) is not None:
            with self.engine.lock:
                self._scheduler.abort(job.request.id, time.monotonic())
            self._release_if_done(job)
            self._metrics.load(self.load())  # there may be no pass to tell
            self.engine.wake()
        if job.lease:
            self._producer.revoke(job.lease)

    def progress(self) -> list[Progress]:
        """What this worker holds, for the report: prefills that have no new output yet. A
        complete one is the gateway's to hand off, long before its claim runs out."""
        return [
            Progress(job.request_id, job.claim.fence, job.prior_tokens, job.served)
            for job in self._jobs.values()
        ]

    def drop(self, progress: Progress, verdict: Verdict) -> None:
        """The queue says that a request is not ours any more."""
        for job in list(self._jobs.values()):
            if (job.request_id, job.claim.fence) == (progress.request_id, progress.fence):
                self._fail(job, Unavailable(f"the claim is {verdict.name.lower()}"))

    def load(self) -> Load:
        """How busy this worker is."""
        with self.engine.lock:
            load = self._scheduler.cost.tell(self._scheduler.load())
        return replace(load, draining=self.draining)

    @property
    def idle(self) -> bool:
        """No prefill runs and nobody reads blocks of this worker."""
        return not self._jobs and not self._leased

    async def stop(self) -> None:
        """End every job, then the engine."""
        for job in list(self._jobs.values()):
            self._fail(job, Unavailable("this worker is shutting down"))
        await self.engine.stop()
