"""The decode worker's scheduler: continuous batching over paged KV.

    plan   = scheduler.plan(now)
    result = executor.execute(plan)
    events = scheduler.apply(plan, result, now)

There is no prefill phase and no decode phase: every sequence lets `computed` catch up with its
tokens. A RUNNING sequence holds blocks for all its tokens; it got them when it was admitted, and
takes one more whenever generation crosses into a new block. If none is free then, the worst-ranked
running sequence gives up its blocks and waits to be recomputed.

Why this never stands still: blocks are taken away only by a sequence that samples a token in the
very same pass. Between two such passes recomputation only advances, so it ends in sampled tokens
too; and tokens, once sampled, are kept. (A sequence may have to wait for blocks that a KV
transfer is filling. Transfers have deadlines.)

Between `plan` and `apply` a pass reads the plan's sequences on another thread. All other methods
may be called meanwhile: they leave those sequences as they are until `apply`.

Knows nothing of models, transports or gateways, and reads no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from baton.errors import AlreadyExists, InvalidRequest, Overloaded
from baton.types import Finish, Load, Logprob, Output, Request
from scheduling.admission import longest_kv, require_fit
from scheduling.blocks import BlockAllocator
from scheduling.budget import splitfuse
from scheduling.events import DecodeEvent, LocalPrefill, PromptLogprobs, RequestFailed
from scheduling.order import Policy
from scheduling.plan import Capacity, Chunk, Sampled, StepPlan, StepResult
from scheduling.prompt import PromptRecord
from scheduling.sequence import Phase, Sequence


@dataclass(slots=True)
class _Group:
    """The unfinished sequences of one request. `prompt` is kept while it is computed here and
    until it has been reported."""

    request: Request
    sequences: list[Sequence]
    prompt: PromptRecord | None


class DecodeScheduler:
    """Owns every sequence of a decode worker and all blocks of its KV pool."""

    def __init__(self, capacity: Capacity, policy: Policy, *, max_waiting: int) -> None:
        self._capacity = capacity
        self._policy = policy
        self._max_waiting = max_waiting
        self._blocks = BlockAllocator(capacity.blocks)
        self._groups: dict[str, _Group] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._incoming: list[Sequence] = []  # also aborted ones, until their transfer is quiet
        self._in_pass: frozenset[Sequence] = frozenset()
        self._doomed: list[Sequence] = []  # aborted during the pass that they are in
        self._plan: StepPlan | None = None  # the pass that runs now
        self._head_blocked = False  # the next sequence to admit found too few free blocks

    # -- Requests come and go --------------------------------------------------------------

    def submit(self, request: Request, now: float) -> list[Sequence]:
        """Take a request whose prompt is computed here. Returns its sequences: those that an
        earlier attempt has not finished.

        Raises InvalidRequest if it can never fit, Overloaded if too many wait, AlreadyExists.
        """
        self._check(request)
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded("too many requests wait on this worker", subject="decode worker")
        group = self._enter(request, PromptRecord(request, now), now)
        for sequence in group.sequences:
            self._policy.join(sequence, sequence.uncomputed, now)
        self._waiting += group.sequences
        return list(group.sequences)

    def reserve(self, request: Request, now: float) -> Sequence:
        """Take a request whose KV comes from elsewhere, and allocate the blocks for it.

        Returns sequence 0, INCOMING; its tokens are the prompt and what earlier attempts
        generated. Its siblings wait for it. Ends with `arrived`, `lost` or `abort`. Raises
        Overloaded if there is no room now, InvalidRequest if never, AlreadyExists.
        """
        self._check(request)
        if request.prior(0).finished:
            raise InvalidRequest.of("prior_outputs", "sequence 0 has ended: nothing to hand over")
        tokens = len(request.prompt_ids) + len(request.prior(0).token_ids)
        needed = self._capacity.blocks_for(tokens)
        if self._head_blocked or not self._has_room(needed):
            raise Overloaded("no room for its KV on this worker", subject="KV blocks")
        group = self._enter(request, None, now)
        for sequence in group.sequences:
            self._policy.join(sequence, 1, now)
        first, *siblings = group.sequences
        first.blocks = self._blocks.allocate(needed)
        first.move(Phase.INCOMING)
        self._incoming.append(first)
        self._waiting += siblings
        return first

    def arrived(self, sequence: Sequence, first_token: int, now: float) -> list[DecodeEvent]:
        """The KV of all its tokens is in its blocks, and `first_token` was sampled after them.

        Nothing to report unless that token ends the sequence; the token itself is known to
        the client. The blocks of a sequence that was aborted meanwhile are freed.
        """
        if sequence.phase is Phase.FINISHED:
            self.quiet(sequence)
            return []
        self._incoming.remove(sequence)
        sequence.computed = len(sequence.tokens)
        self._policy.join(sequence, 1, now)
        sequence.move(Phase.RUNNING)
        self._running.append(sequence)
        self._admit_siblings(sequence)
        return self._accept(sequence, first_token)

    def lost(self, sequence: Sequence, first_token: int, now: float) -> list[DecodeEvent]:
        """The KV could not be had and nothing writes to its blocks any more: compute it here."""
        if sequence.phase is Phase.FINISHED:
            self.quiet(sequence)
            return []
        self._incoming.remove(sequence)
        self._free(sequence)
        self._policy.join(sequence, sequence.uncomputed, now)
        sequence.move(Phase.WAITING)
        self._waiting.append(sequence)
        return self._accept(sequence, first_token)

    def abort(self, request_id: str, now: float) -> bool:
        """Drop a request; no event will name it again. False if it is not here (any more).

        Its blocks are free at once, except those that a pass is using (free when it ends) and
        those of an INCOMING sequence (free when the caller says `quiet`).
        """
        group = self._groups.pop(request_id, None)
        if group is None:
            return False
        for sequence in group.sequences:
            if sequence in self._in_pass:
                self._doomed.append(sequence)
            else:
                self._drop(sequence)
        return True

    def quiet(self, sequence: Sequence) -> None:
        """Nothing writes to the blocks of this aborted INCOMING sequence any more: free them."""
        if sequence.phase is Phase.FINISHED and sequence in self._incoming:
            self._incoming.remove(sequence)
            self._free(sequence)

    # -- The step --------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next pass, or None if nothing can run. `apply` or `fail` must follow a plan.

        Slots of the batch go by rank, so a better-ranked sequence can displace a running one,
        which keeps its blocks. The token budget goes to generation first, then by rank.
        """
        if self._plan is not None:
            raise RuntimeError("the last plan was not applied")
        ranked = [*self._running, *self._waiting]
        self._policy.promote(ranked, now)
        ranked.sort(key=self._policy.rank)
        chosen = self._choose(ranked)
        generating = [s for s in chosen if s.generating][: self._capacity.max_tokens]
        ready = [s for s in generating if self._grow(s, ranked)]
        prompts = [s for s in chosen if not s.generating and s.phase is Phase.RUNNING]
        chunks = splitfuse(ready, prompts, self._capacity.max_tokens)
        if not chunks:
            return None
        for chunk in chunks:
            self._begin_prompt(chunk.sequence, now)
        self._plan = StepPlan(chunks)
        self._in_pass = frozenset(chunk.sequence for chunk in chunks)
        self._blocks.begin_pass()
        return self._plan

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[DecodeEvent]:
        """Take what the pass gave. Chunks of requests aborted meanwhile are dropped."""
        self._end_pass(plan)
        live = [
            (chunk, sampled, logprobs)
            for chunk, sampled, logprobs in zip(
                plan.chunks, result.sampled, result.prompt_logprobs, strict=True
            )
            if chunk.sequence.phase is Phase.RUNNING
        ]
        events: list[DecodeEvent] = []
        for chunk, _, logprobs in live:
            chunk.sequence.computed += chunk.length
            self._policy.charge(chunk.sequence, result.seconds, now)
            events += self._prompt_news(chunk, logprobs, now)
        for chunk, sampled, _ in live:
            if sampled is not None:
                if chunk.start < chunk.sequence.prompt_length:
                    self._admit_siblings(chunk.sequence)
                events += self._emit(chunk.sequence, sampled)
        return events

    def fail(self, plan: StepPlan, now: float) -> list[DecodeEvent]:
        """The pass broke: every request in it ends, with all its sequences."""
        self._end_pass(plan)
        live = [c.sequence for c in plan.chunks if c.sequence.phase is Phase.RUNNING]
        failed = dict.fromkeys(sequence.request.id for sequence in live)
        for request_id in failed:
            self.abort(request_id, now)
        return [RequestFailed(request_id) for request_id in failed]

    # -- Facts -----------------------------------------------------------------------------

    def load(self) -> Load:
        """How busy this worker is. Sequences whose KV is on its way count as running."""
        return Load(
            running=len(self._running) + len(self._incoming),
            waiting=len(self._waiting),
            free_blocks=self._blocks.free,
            total_blocks=self._blocks.total,
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError if a block is lost or owned twice, or a sequence is out of place."""
        self._blocks.check_integrity(s.blocks for s in (*self._running, *self._incoming))
        for sequence in self._running:
            held, tokens = len(sequence.blocks), len(sequence.tokens)
            # A generating sequence may still lack the block for its newest token.
            if held not in {self._capacity.blocks_for(t) for t in (tokens, tokens - 1)}:
                raise RuntimeError(f"sequence {sequence.id}: {held} blocks for {tokens} tokens")
            if sequence.phase is not Phase.RUNNING or not 0 <= sequence.computed < tokens:
                raise RuntimeError(f"sequence {sequence.id} does not belong in the batch")
        for sequence in self._waiting:
            if sequence.phase is not Phase.WAITING or sequence.blocks or sequence.computed:
                raise RuntimeError(f"sequence {sequence.id} waits with something in hand")
        placed = {*self._waiting, *self._running, *self._incoming}
        for group in self._groups.values():
            if not group.sequences or not placed.issuperset(group.sequences):
                raise RuntimeError(f"request {group.request.id} has lost a sequence")

    # -- Choosing --------------------------------------------------------------------------

    def _choose(self, ranked: Iterable[Sequence]) -> list[Sequence]:
        """The sequences of the next pass, best first. Waiting ones are admitted on the way while
        the pass has tokens left for them; nobody overtakes one for which there is no room."""
        chosen: list[Sequence] = []
        self._head_blocked = False
        generating = sum(s.generating for s in self._running)
        left = self._capacity.max_tokens - min(generating, self._capacity.max_sequences)
        for sequence in ranked:
            if len(chosen) == self._capacity.max_sequences:
                break
            if sequence.generating:
                chosen.append(sequence)
                continue
            if left <= 0:
                continue
            if sequence.phase is Phase.WAITING:
                if self._head_blocked or self._must_wait_for_sibling(sequence):
                    continue
                if not self._admit(sequence):
                    self._head_blocked = True
                    continue
            left -= sequence.uncomputed
            chosen.append(sequence)
        return chosen

    def _has_room(self, needed: int) -> bool:
        """One free block per running sequence is left over, so that what comes in is not thrown
        out again as soon as the others grow."""
        return self._blocks.free >= needed + len(self._running)

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all its tokens, if there is room. The full blocks
        of the prompt are shared with a sibling that has computed them."""
        shared = self._prompt_of_sibling(sequence)
        needed = self._capacity.blocks_for(len(sequence.tokens)) - len(shared)
        if not self._has_room(needed):
            return False
        sequence.blocks = self._blocks.share(shared) + self._blocks.allocate(needed)
        sequence.computed = len(shared) * self._capacity.block_size
        self._waiting.remove(sequence)
        sequence.move(Phase.RUNNING)
        self._running.append(sequence)
        return True

    def _grow(self, sequence: Sequence, ranked: list[Sequence]) -> bool:
        """Give a generating sequence the block for its next token, taking it from the worst-ranked
        running one if need be. False if only better-ranked ones are left: they go first."""
        if sequence.phase is not Phase.RUNNING:
            return False  # it had to give up its blocks a moment ago
        if self._capacity.blocks_for(len(sequence.tokens)) == len(sequence.blocks):
            return True
        while not self._blocks.free:
            victim = next(s for s in reversed(ranked) if s.phase is Phase.RUNNING)
            if victim is sequence:
                return False
            self._preempt(victim)
        sequence.blocks += self._blocks.allocate(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._free(sequence)
        self._running.remove(sequence)
        sequence.preemptions += 1
        sequence.move(Phase.WAITING)
        self._waiting.append(sequence)

    # -- Siblings: n > 1 share the full blocks of their prompt ------------------------------

    def _shareable(self, request: Request) -> int:
        """Blocks that only hold prompt tokens, the last one excepted: each sequence computes
        at least that one itself, as its first token is sampled there."""
        return (len(request.prompt_ids) - 1) // self._capacity.block_size

    def _prompt_of_sibling(self, sequence: Sequence) -> list[int]:
        count = self._shareable(sequence.request)
        for sibling in self._groups[sequence.request.id].sequences:
            done = sibling.computed >= count * self._capacity.block_size
            if sibling.phase is Phase.RUNNING and done:
                return sibling.blocks[:count]
        return []

    def _must_wait_for_sibling(self, sequence: Sequence) -> bool:
        """True while a sibling is on its way to a prompt that can be shared."""
        tokens = self._shareable(sequence.request) * self._capacity.block_size
        return any(
            s.phase is Phase.INCOMING or (s.phase is Phase.RUNNING and s.computed < tokens)
            for s in self._groups[sequence.request.id].sequences
        )

    def _admit_siblings(self, sequence: Sequence) -> None:
        """`sequence` has just got its prompt: let in those that wait for it, before it may end."""
        for sibling in self._groups[sequence.request.id].sequences:
            if sibling.phase is Phase.WAITING and (self._head_blocked or not self._admit(sibling)):
                return

    # -- Keeping the books -----------------------------------------------------------------

    def _check(self, request: Request) -> None:
        require_fit(request, self._capacity, longest_kv(request))
        if request.id in self._groups:
            raise AlreadyExists(f"request {request.id!r} is already here")

    def _enter(self, request: Request, prompt: PromptRecord | None, now: float) -> _Group:
        sequences = [
            Sequence.start(request, index, now)
            for index in range(request.sampling.n)
            if not request.prior(index).finished
        ]
        group = _Group(request, sequences, prompt)
        if sequences:
            self._groups[request.id] = group
        return group

    def _begin_prompt(self, sequence: Sequence, now: float) -> None:
        prompt = self._groups[sequence.request.id].prompt
        if prompt is not None:
            prompt.begin(now)

    def _prompt_news(
        self, chunk: Chunk, logprobs: tuple[Logprob, ...], now: float
    ) -> list[DecodeEvent]:
        """Note the pass in the prompt's record; report and close it when the prompt is done."""
        group = self._groups[chunk.sequence.request.id]
        if group.prompt is None:
            return []
        group.prompt.add(chunk, logprobs)
        if not chunk.sample:
            return []
        record, group.prompt = group.prompt, None
        events: list[DecodeEvent] = [
            LocalPrefill(group.request.id, record.queued, record.computed(now))
        ]
        if group.request.prompt_logprobs is not None:
            events.append(PromptLogprobs(group.request.id, tuple(record.logprobs)))
        return events

    def _emit(self, sequence: Sequence, sampled: Sampled) -> list[DecodeEvent]:
        finish = sequence.append(sampled.token_id)
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        output = Output(sequence.request.id, sequence.index, (sampled.token_id,), logprobs, finish)
        if finish is not None:
            self._finish(sequence, finish)
        return [output]

    def _accept(self, sequence: Sequence, token_id: int) -> list[DecodeEvent]:
        """Append a token that was sampled elsewhere and reported from there."""
        finish = sequence.append(token_id)
        if finish is None:
            return []
        self._finish(sequence, finish)
        return [Output(sequence.request.id, sequence.index, (), (), finish)]

    def _finish(self, sequence: Sequence, finish: Finish) -> None:
        sequence.finish = finish
        group = self._groups[sequence.request.id]
        group.sequences.remove(sequence)
        if not group.sequences:
            del self._groups[sequence.request.id]
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        """Take a sequence that no pass is using out of its list; a transfer may go on writing."""
        if sequence.phase is Phase.WAITING:
            self._waiting.remove(sequence)
            self._head_blocked = False  # until the next plan, as it may have been the head
        elif sequence.phase is Phase.RUNNING:
            self._running.remove(sequence)
            self._free(sequence)
        sequence.move(Phase.FINISHED)

    def _free(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0

    def _end_pass(self, plan: StepPlan) -> None:
        if plan is not self._plan:
            raise RuntimeError("this plan does not run")
        self._plan, self._in_pass = None, frozenset()
        self._blocks.end_pass()
        for sequence in self._doomed:
            self._drop(sequence)
        self._doomed.clear()
