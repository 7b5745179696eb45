"""The prefill worker's scheduler: chunks of many prompts in each pass, and nothing else.

A request gets the blocks for all its tokens before its first chunk, so it is never preempted for
memory and always ends. It is here as sequence 0 only; siblings (n > 1) are the decode worker's.

Blocks are the scheduler's until `PrefillStarted` is reported, the receiver's from then on (see
there). Those of a prefix may be handed to several receivers at a time. Between `plan` and `apply`
all other methods may be called, as in scheduling/decode.py.

Knows nothing of leases or transports, and reads no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass

from baton.errors import AlreadyExists, InvalidRequest, Overloaded
from baton.types import Load, Output, Request
from scheduling.admission import require_fit
from scheduling.blocks import BlockAllocator
from scheduling.budget import splitfuse
from scheduling.cost import CostTracker, StepRecord
from scheduling.events import (
    PrefillAdvanced,
    Prefilled,
    PrefillEvent,
    PrefillStarted,
    RequestFailed,
)
from scheduling.in_flight import InFlight
from scheduling.order import Policy
from scheduling.plan import Capacity, Chunk, Sampled, StepPlan, StepResult
from scheduling.prefix import BlockKeys, PrefixCache, PrefixCounters
from scheduling.prompt import PromptRecord
from scheduling.sequence import Phase, Sequence
from scheduling.shares import Tenants, in_turn, token_shares


@dataclass(slots=True, eq=False)
class _Job:
    """One request. `handed_over`: its blocks have become the receiver's."""

    sequence: Sequence
    prompt: PromptRecord
    handed_over: bool = False


class PrefillScheduler:
    """Owns the sequences of a prefill worker, and all blocks but those it has handed over."""

    def __init__(
        self,
        capacity: Capacity,
        policy: Policy,
        *,
        max_waiting: int,
        cost: CostTracker | None = None,
        block_keys: BlockKeys | None = None,
    ) -> None:
        """`cost` is told of every pass; share it with the policy. With `block_keys`, KV of
        prefixes is reused (scheduling/prefix.py)."""
        self._capacity = capacity
        self._policy = policy
        self.cost = cost or CostTracker()
        self._max_waiting = max_waiting
        self._blocks = BlockAllocator(capacity.blocks)
        self._prefixes = PrefixCache(self._blocks, capacity.block_size, block_keys)
        self._handed_over: Counter[int] = Counter()  # how many receivers have each block
        self._jobs: dict[str, _Job] = {}  # live ones, by request id
        self._tenants = Tenants()  # theirs
        self._in_flight = InFlight[_Job](capacity.depth)  # the job of each chunk

    # -- Requests come and go --------------------------------------------------------------

    def submit(self, request: Request, now: float) -> Sequence:
        """Take a request.

        Raises InvalidRequest if it can never fit, Overloaded if too many wait, AlreadyExists.
        """
        prior = request.prior(0)
        require_fit(request, self._capacity, len(request.prompt_ids) + len(prior.token_ids))
        if prior.finished:
            raise InvalidRequest.of("prior_outputs", "sequence 0 has ended: nothing to prefill")
        if request.id in self._jobs:
            raise AlreadyExists(f"request {request.id!r} is already here")
        if self.load().waiting >= self._max_waiting:
            raise Overloaded("too many prompts wait on this worker", subject="prefill worker")
        sequence = Sequence.start(request, 0, now)
        self._prefixes.find(sequence)
        self._policy.join(sequence, sequence.to_compute, now)
        self._jobs[request.id] = _Job(sequence, PromptRecord(request, now))
        self._tenants.came(request.tenant)
        return sequence

    def abort(self, request_id: str, now: float) -> bool:
        """Drop a request; no event will name it again. False if it is not here (any more).

        Blocks that were handed over stay with their receiver.
        """
        job = self._jobs.pop(request_id, None)
        if job is None:
            return False
        self._tenants.went(job.sequence.request.tenant)
        if not self._in_flight.give_up(job):
            self._end(job)
        return True

    def release(self, blocks: Items[int]) -> None:
        """Take back blocks that were handed over, at any time: if a pass still writes to them,
        they are not used again before it ends, nor before others that have begun."""
        self._handed_over.subtract(blocks)
        self._blocks.release(blocks)

    # -- The step --------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next pass, or None if nothing can run (until a pass that does has been applied).
        `apply` or `fail` must follow a plan, in the order of the plans.

        Tenants share its tokens (scheduling/shares.py); each one's go by rank. So a prompt takes
        at most as many times as long as there are tenants, whatever the others send.
        """
        self._in_flight.require_room()
        running = self._in_flight.members
        ranked = [job.sequence for job in self._jobs.values() if job not in running]
        self._policy.promote(ranked, now)
        ranked.sort(key=self._policy.rank)
        if self._tenants.several:
            chunks = self._divide(in_turn(ranked, self._capacity.max_sequences))
        else:
            chunks = splitfuse((), self._choose(ranked), self._capacity.max_tokens)
        if not chunks:
            return None
        plan = StepPlan(chunks)
        jobs = tuple([self._jobs[chunk.sequence.request.id] for chunk in chunks])
        self._in_flight.begin(plan, jobs)
        for job in jobs:
            job.prompt.begin(job.sequence, now)
        self._blocks.begin_pass()
        return plan

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[PrefillEvent]:
        """Take what the pass gave. Chunks of requests aborted meanwhile are dropped."""
        self.cost.add(StepRecord.of(plan, result.seconds))
        events: list[PrefillEvent] = []
        for job, chunk, sampled, logprobs in zip(
            self._end_pass(plan),
            plan.chunks,
            result.sampled,
            result.prompt_logprobs,
            strict=True,
        ):
            sequence = job.sequence
            if sequence.phase is not Phase.RUNNING:
                continue
            if not job.handed_over:
                job.handed_over = True
                self._handed_over.update(sequence.blocks)
                events.append(PrefillStarted(sequence))
            sequence.computed += chunk.length
            self._prefixes.keep(sequence)
            self._policy.charge(sequence, result.seconds, now)
            job.prompt.add(chunk, logprobs)
            events.append(PrefillAdvanced(sequence, sequence.computed))
            if sampled is not None:
                events.append(self._complete(job, sampled, now))
        return events

    def fail(self, plan: StepPlan, now: float) -> list[PrefillEvent]:
        """The pass broke: every request in it ends."""
        jobs = self._end_pass(plan)
        failed = [j.sequence.request.id for j in jobs if j.sequence.phase is Phase.RUNNING]
        for request_id in failed:
            self.abort(request_id, now)
        return [RequestFailed(request_id) for request_id in failed]

    # -- Facts -----------------------------------------------------------------------------

    @property
    def prefixes(self) -> PrefixCounters:
        """What was found of prompts since the start."""
        return self._prefixes.counters

    def load(self) -> Load:
        """How busy this worker is. Blocks that were handed over are not free."""
        waiting = sum(job.sequence.phase is Phase.WAITING for job in self._jobs.values())
        return Load(
            running=len(self._jobs) - waiting,
            waiting=waiting,
            free_blocks=self._blocks.free,
            total_blocks=self._blocks.total,
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError if a block is lost or owned twice, or a sequence is out of place."""
        jobs = [*self._jobs.values(), *self._in_flight.doomed]
        own = [job.sequence.blocks for job in jobs if not job.handed_over]
        self._blocks.check_integrity([*own, list(self._handed_over.elements())])
        for job in self._jobs.values():
            sequence = job.sequence
            blocks = {
                Phase.WAITING: 0,
                Phase.RUNNING: self._capacity.blocks_for(len(sequence.tokens)),
            }
            if len(sequence.blocks) != blocks.get(sequence.phase):
                raise RuntimeError(f"sequence {sequence.id} holds {len(sequence.blocks)} blocks")

    # -- Choosing and keeping the books ----------------------------------------------------

    def _most(self) -> int:
        """Sequences in the next plan. Those that wait count for its share, too: whoever starts here
        has ended a few passes later."""
        return min(self._capacity.max_sequences, self._in_flight.share(len(self._jobs)))

    def _choose(self, ranked: Items[Sequence]) -> list[Sequence]:
        """As many of the best as the pass has tokens for; nobody overtakes one for whose blocks
        there is no room."""
        chosen: list[Sequence] = []
        left, most, head_blocked = self._capacity.max_tokens, self._most(), False
        for sequence in ranked:
            if left <= 0 or len(chosen) == most:
                break
            if sequence.phase is Phase.WAITING:
                head_blocked = head_blocked or not self._admit(sequence)
                if head_blocked:
                    continue
            left -= sequence.uncomputed
            chosen.append(sequence)
        return chosen

    def _divide(self, ranked: Items[Sequence]) -> tuple[Chunk, ...]:
        """The same for several tenants: each gets up to its share of the tokens, in the given
        order, and then whoever comes first what is left because there was no room for others."""
        left, most, head_blocked = self._capacity.max_tokens, self._most(), False
        shares = token_shares(ranked, left)
        granted: dict[Sequence, int] = {}
        for shared in (True, False):
            for sequence in ranked:
                tenant = (sequence.request.priority, sequence.request.tenant)
                had = granted.get(sequence, 0)
                entitled = min(left, shares[tenant]) if shared else left
                if entitled <= 0 or (not had and len(granted) == most):
                    continue
                if sequence.phase is Phase.WAITING:
                    head_blocked = head_blocked or not self._admit(sequence)
                    if head_blocked:
                        continue
                tokens = min(entitled, sequence.uncomputed - had)
                if not tokens:
                    continue
                granted[sequence] = had + tokens
                shares[tenant] -= tokens
                left -= tokens
        return tuple(
            Chunk(s, s.computed, tokens, tokens == s.uncomputed) for s, tokens in granted.items()
        )

    def _admit(self, sequence: Sequence) -> bool:
        known = self._prefixes.find(sequence)
        needed = self._capacity.blocks_for(len(sequence.tokens)) - len(known)
        if needed + self._blocks.idle(known) > self._blocks.free:
            return False
        sequence.blocks = self._blocks.share(known) + self._blocks.allocate(needed)
        sequence.computed, sequence.kept = sequence.cached, len(known)
        self._prefixes.count(sequence)
        sequence.move(Phase.RUNNING)
        return True

    def _complete(self, job: _Job, sampled: Sampled, now: float) -> Prefilled:
        sequence = job.sequence
        del self._jobs[sequence.request.id]
        self._tenants.went(sequence.request.tenant)
        sequence.finish = sequence.append(sampled.token_id)
        sequence.move(Phase.FINISHED)
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        output = Output(sequence.request.id, 0, (sampled.token_id,), logprobs, sequence.finish)
        return Prefilled(
            sequence,
            output,
            prompt_logprobs=tuple(job.prompt.logprobs),
            queued=job.prompt.queued,
            computed=job.prompt.computed(now),
            cached=job.prompt.cached,
        )

    def _end(self, job: _Job) -> None:
        """Drop a job that no pass is using."""
        if not job.handed_over:
            self._blocks.release(job.sequence.blocks)
        job.sequence.move(Phase.FINISHED)

    def _end_pass(self, plan: StepPlan) -> tuple[_Job, ...]:
        """Close the pass and return its jobs, in the order of the plan's chunks."""
        jobs, doomed = self._in_flight.end(plan)
        self._blocks.end_pass()
        for job in doomed:
            self._end(job)
        return jobs
