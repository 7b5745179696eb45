"""One simulated prefill worker and its link: prompts in, KV and first tokens out."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from baton.errors import InvalidRequest, Overloaded
from scheduling.cost import CostTracker
from scheduling.events import PrefillAdvanced, Prefilled
from scheduling.plan import StepPlan, StepResult
from scheduling.prefill import PrefillScheduler
from scheduling.routing import Candidate
from scheduling.simulator.executor import CostExecutor
from scheduling.simulator.outcome import Tally
from scheduling.simulator.traffic import Job
from scheduling.simulator.worker import WorkerSpec


@dataclass(frozen=True, slots=True)
class Transfer:
    """The way of KV from a prefill worker to a decode worker: one queue per prefill worker.
    `latency` in seconds, from the last byte sent to the sequence being ready to run."""

    block_bytes: int
    bytes_per_second: float
    latency: float = 0.0

    def seconds(self, blocks: int) -> float:
        """Time on the link."""
        return blocks * self.block_bytes / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class HandedOff:
    """A prompt is computed and its first token known; the KV is complete at the other end
    `kv_at`. The blocks are held here until `release`."""

    job: Job
    kv_at: float
    blocks: tuple[int, ...]


@dataclass(slots=True)
class _Prompt:
    job: Job
    queued: int  # tokens that were to be computed when it came
    sent: int = 0  # blocks that are queued on the link


class SimulatedPrefillWorker:
    """Drives a PrefillScheduler through virtual time, as SimulatedWorker does its own. KV is sent
    chunk by chunk, while later ones are computed."""

    def __init__(self, spec: WorkerSpec, transfer: Transfer) -> None:
        tracker = CostTracker(spec.cost, every=0)
        self.spec = spec
        self.scheduler = PrefillScheduler(
            spec.capacity,
            spec.policy(tracker),
            max_waiting=spec.max_waiting,
            cost=tracker,
            block_keys=spec.block_keys,
        )
        self.executor = CostExecutor(spec.cost)
        self.steps = 0
        self.busy_seconds = 0.0
        self.queued_tokens = 0  # of prompts that are not computed to their end
        self._transfer = transfer
        self._link_free_at = 0.0
        self._prompts: dict[str, _Prompt] = {}
        self._candidate: Candidate | None = None
        self._pass: tuple[StepPlan, StepResult, float] | None = None

    def submit(self, job: Job, now: float) -> bool:
        """Take a job. False if the worker refuses it."""
        try:
            sequence = self.scheduler.submit(job.request(), now)
        except (InvalidRequest, Overloaded):
            return False
        self._candidate = None
        self._prompts[job.id] = prompt = _Prompt(job, job.prompt_tokens - sequence.cached)
        self.executor.expect(sequence, job.output_tokens)
        self.queued_tokens += prompt.queued
        return True

    def release(self, blocks: Items[int]) -> None:
        """The KV in these blocks has been read."""
        self._candidate = None
        self.scheduler.release(blocks)

    @property
    def ends(self) -> float | None:
        """When the pass that runs ends; None if none does."""
        return None if self._pass is None else self._pass[2]

    def candidate(self, name: str) -> Candidate:
        """What a router sees of it, under this name; the same until something happens here."""
        if self._candidate is None:
            load = self.scheduler.load()
            self._candidate = Candidate(
                name,
                sequences=len(self._prompts),
                queued_tokens=self.queued_tokens,
                free_blocks=load.free_blocks,
                total_blocks=load.total_blocks,
                outstanding_tokens=0,
            )
        return self._candidate

    def tally(self) -> Tally:
        """Counters since the start."""
        return Tally(prompt_tokens=self.executor.prompt_tokens)

    @property
    def jobs(self) -> int:
        """Prompts that are not complete."""
        return len(self._prompts)

    def begin(self, now: float) -> float | None:
        """Start the next pass; returns when it ends, or None if nothing can run now."""
        self._candidate = None
        plan = self.scheduler.plan(now)
        if plan is None:
            return None
        result = self.executor.execute(plan, now)
        self._pass = (plan, result, now + result.seconds)
        return now + result.seconds

    def end(self) -> list[HandedOff]:
        """The pass is over: returns the prompts that it completed."""
        self._candidate = None
        assert self._pass is not None
        (plan, result, now), self._pass = self._pass, None
        self.steps += 1
        self.busy_seconds += result.seconds
        complete = []
        for event in self.scheduler.apply(plan, result, now):
            if isinstance(event, PrefillAdvanced):
                prompt = self._prompts[event.sequence.request.id]
                self._send(prompt, event.computed // self.spec.capacity.block_size, now)
            elif isinstance(event, Prefilled):
                complete.append(self._complete(event, now))
        return complete

    def _complete(self, event: Prefilled, now: float) -> HandedOff:
        sequence = event.sequence
        prompt = self._prompts.pop(sequence.request.id)
        self.executor.forget(sequence)
        self.queued_tokens -= prompt.queued
        self._send(prompt, len(sequence.blocks), now)
        kv_at = max(now, self._link_free_at) + self._transfer.latency
        return HandedOff(prompt.job, kv_at, tuple(sequence.blocks))

    def _send(self, prompt: _Prompt, blocks: int, now: float) -> None:
        """Queue what has become final."""
        if blocks > prompt.sent:
            start = max(now, self._link_free_at)
            self._link_free_at = start + self._transfer.seconds(blocks - prompt.sent)
            prompt.sent = blocks
