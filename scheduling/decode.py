"""The decode worker's scheduler: continuous batching over paged KV.

    plan   = scheduler.plan(now)
    result = executor.execute(plan)
    events = scheduler.apply(plan, result, now)

There is no prefill phase and no decode phase: every sequence lets `computed` catch up with its
tokens, generation first. Who holds KV blocks and who gives way is scheduling/residency.py.

Why this never stands still: KV is thrown away only for a sequence that samples a token in the very
same pass. Between two such passes recomputation only advances, so it ends in sampled tokens too;
and tokens, once sampled, are kept. A swap loses nothing that was computed, and who was brought back
runs before it goes again, unless somebody grows. The best-ranked sequence on the device takes what
it lacks from the others there, or what a swap is about to free; with nobody there, the best of all
is let in. (It may have to wait for blocks that a KV transfer or a swap is using. Transfers have
deadlines, swaps end, and a plan without chunks waits for one.)

Between `plan` and `apply` a pass reads the plan's sequences on another thread. All other methods
may be called meanwhile: they leave those sequences as they are until `apply`. Up to
`capacity.depth` plans, of disjoint sequences, may be made before the oldest is applied
(scheduling/in_flight.py); who is in one gives way to nobody until then.

Knows nothing of models, transports or gateways, and reads no clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter

from baton.errors import AlreadyExists, InvalidRequest, Overloaded
from baton.types import Finish, Load, Output, Request
from scheduling.admission import longest_kv, require_fit
from scheduling.choosing import Chooser
from scheduling.cost import CostTracker, StepRecord
from scheduling.events import DecodeEvent, RequestFailed
from scheduling.filling import Door
from scheduling.group import Group, Groups
from scheduling.in_flight import InFlight
from scheduling.load import load_of
from scheduling.order import Policy
from scheduling.plan import Capacity, Sampled, StepPlan, StepResult
from scheduling.prefix import BlockKeys, PrefixCounters
from scheduling.proactive import ProactiveSwaps
from scheduling.prompt import PromptRecord
from scheduling.residency import Counters, Residency
from scheduling.rules import Rules
from scheduling.sequence import Phase, Sequence
from scheduling.shares import in_turn

_KEPT_RANK = attrgetter("rank")
_RUNNING = Phase.RUNNING


class DecodeScheduler:
    """Owns every sequence of a decode worker and all blocks of its KV pool."""

    def __init__(
        self,
        capacity: Capacity,
        policy: Policy,
        *,
        max_waiting: int,
        rules: Rules | None = None,
        cost: CostTracker | None = None,
        block_keys: BlockKeys | None = None,
    ) -> None:
        """`cost` is told of every pass; share it with the policy. With `block_keys`, KV of
        prefixes is reused (scheduling/prefix.py)."""
        self._capacity = capacity
        self._policy = policy
        self._rules = rules or Rules()
        self.cost = cost or CostTracker()
        self._max_waiting = max_waiting
        self._groups = Groups()
        self._kv = Residency(
            capacity, self._rules, lambda s: self._groups[s.request.id].sequences, block_keys
        )
        self._in_flight = InFlight[Sequence](capacity.depth)
        self._door = Door(self._rules, capacity.max_sequences)
        self._chooser = Chooser(
            capacity, self._rules, self.cost, self._kv, self._door, self._in_flight
        )
        self._proactive = ProactiveSwaps(capacity, self._rules, policy, self._kv, self._chooser)
        self._waits = self._stalls = 0

    # -- Requests come and go --------------------------------------------------------------

    def submit(self, request: Request, now: float) -> list[Sequence]:
        """Take a request whose prompt is computed here. Returns its sequences: those that an
        earlier attempt has not finished.

        Raises InvalidRequest if it can never fit, Overloaded if too many wait, AlreadyExists.
        """
        self._check(request)
        if len(self._kv.waiting) >= self._max_waiting:
            raise Overloaded("too many requests wait on this worker", subject="decode worker")
        group = Group.of(request, PromptRecord(request, now), now)
        if group.sequences:
            self._groups.enter(group)
        for sequence in group.sequences:
            self._kv.known(sequence)
            self._policy.join(sequence, sequence.to_compute, now)
        self._kv.wait(group.sequences)
        return list(group.sequences)

    def reserve(self, request: Request, now: float) -> Sequence:
        """Take a request whose KV comes from elsewhere, and allocate the blocks for it.

        Returns sequence 0, INCOMING; its tokens are the prompt and what earlier attempts
        generated. The KV of the first `cached` of them is here, in whole blocks that others read:
        only the rest is to be filled. Its siblings wait for it. Ends with `arrived`, `lost` or
        `abort`. Raises Overloaded if there is no room now, InvalidRequest if never, AlreadyExists.
        """
        self._check(request)
        if request.prior(0).finished:
            raise InvalidRequest.of("prior_outputs", "sequence 0 has ended: nothing to hand over")
        group = Group.of(request, None, now)
        first, *siblings = group.sequences
        if not self._kv.try_reserve(first):
            raise Overloaded("no room for its KV on this worker", subject="KV blocks")
        for sequence in group.sequences:
            self._policy.join(sequence, 1, now)
        self._groups.enter(group)
        self._kv.wait(siblings)
        return first

    def arrived(self, sequence: Sequence, first_token: int, now: float) -> list[DecodeEvent]:
        """The KV of all its tokens is in its blocks, and `first_token` was sampled after them.

        Nothing to report unless that token ends the sequence; the token itself is known to
        the client. The blocks of a sequence that was aborted meanwhile are freed.
        """
        if sequence.phase is Phase.FINISHED:
            self._kv.quiet(sequence)
            return []
        self._kv.arrive(sequence)
        self._policy.join(sequence, 1, now)
        self._kv.admit_siblings(sequence)
        return self._accept(sequence, first_token)

    def lost(self, sequence: Sequence, first_token: int, now: float) -> list[DecodeEvent]:
        """The KV could not be had and nothing writes to its blocks any more: compute it here.
        Otherwise as `arrived`."""
        if sequence.phase is Phase.FINISHED:
            self._kv.quiet(sequence)
            return []
        self._kv.lose(sequence)
        self._policy.join(sequence, sequence.to_compute, now)
        return self._accept(sequence, first_token)

    def abort(self, request_id: str, now: float) -> bool:
        """Drop a request; no event will name it again. False if it is not here (any more).

        Its blocks are free at once, except those that a pass is using (free when it ends) and
        those of an INCOMING sequence (free when the caller says `quiet`).
        """
        group = self._groups.take(request_id)
        if group is None:
            return False
        for sequence in group.sequences:
            self._let_go(sequence)
        return True

    def abort_sequence(self, request_id: str, index: int) -> bool:
        """Drop one sequence of a request, as `abort` drops all of them; its siblings go on. False
        if it is not here (any more), or while a transfer fills its blocks: the siblings too wait
        for that."""
        group = self._groups.get(request_id)
        sequences = group.sequences if group else []
        sequence = next((s for s in sequences if s.index == index), None)
        if sequence is None or sequence.phase is Phase.INCOMING:
            return False
        self._groups.remove(sequence)
        self._let_go(sequence)
        return True

    def quiet(self, sequence: Sequence) -> None:
        """Nothing writes to the blocks of this aborted INCOMING sequence any more: free them.
        Idempotent."""
        self._kv.quiet(sequence)

    # -- The step --------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan | None:
        """The next pass, or None if nothing can run (until a pass that does has been applied).
        `apply` or `fail` must follow a plan, in the order of the plans.

        Slots of the batch go to tenants by their shares (scheduling/shares.py), and by rank to
        each one's sequences, so a better-ranked sequence can displace a running one, which keeps
        its blocks unless somebody needs them. The token budget goes to generation first, then in
        the same order.
        """
        self._in_flight.require_room()
        with self._kv.blocks.unused():
            plan = self._next(now)
        if plan is not None:
            self._begin_pass(plan, now)
        return plan

    def _next(self, now: float) -> StepPlan | None:
        kv, members = self._kv, self._in_flight.members
        here = {**kv.running, **kv.swapped, **kv.waiting}
        if members:
            here = {s: None for s in here if s not in members}
        self._policy.promote(here, now)
        ranked = self._in_order(here)
        self._door.knock(ranked, kv.moving or members, now)
        chosen = self._chooser.choose(ranked, now)
        if self._chooser.proactive:
            chosen = self._proactive.begin(ranked, chosen, now)
        chunks = self._chooser.fill(chosen)
        # Nobody waits for swaps alone while a pass runs: its end will tell of them, too.
        if not chunks and not (kv.swaps.pending if self._in_flight else kv.swaps.in_flight):
            return None
        outs, ins = kv.swaps.planned()
        # A pass must wait for its swaps if it uses blocks that they free, or KV that they bring.
        waits = kv.blocks.offers_taken > 0 or any(
            chunk.sequence.phase is Phase.RETURNING for chunk in chunks if ins
        )
        return StepPlan(chunks, outs, ins, waits)

    def _in_order(self, here: dict[Sequence, None]) -> list[Sequence]:
        """Best first. From one plan to the next most keep their places, and the order of the last
        one is soon sorted again."""
        ranked = [*filter(here.__contains__, self._chooser.ranked)]
        if len(ranked) < len(here):
            before = set(ranked)
            ranked += [sequence for sequence in here if sequence not in before]
        rank = self._policy.rank
        for sequence in ranked:
            if sequence.rank is None:
                rank(sequence)
        ranked.sort(key=_KEPT_RANK)
        if not self._groups.tenants.several:
            return ranked
        slots = min(self._capacity.max_sequences, self._capacity.max_tokens)
        keep: Iterable[Sequence] = ()
        if not self._policy.preempts:
            keep = self._chooser.chosen if self._in_flight.depth == 1 else here
        return in_turn(ranked, slots, {s for s in keep if s.phase is _RUNNING})

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[DecodeEvent]:
        """Take what the pass gave. Chunks of requests aborted meanwhile are dropped."""
        doomed = self._end_pass(plan)
        with self._kv.blocks.unused():
            return self._take(plan, result, doomed, now)

    def _take(
        self, plan: StepPlan, result: StepResult, doomed: list[Sequence], now: float
    ) -> list[DecodeEvent]:
        computing = self.cost.model.of(plan) if plan.swaps_first else 0.0
        self._kv.swaps.complete(result.swapped, self._kv.swapped_over, now, computing)
        self._drop(doomed)
        if self.cost.learns and plan.chunks and not plan.swaps_first:
            self.cost.add(StepRecord.of(plan, result.seconds))
        gave = zip(plan.chunks, result.sampled, result.prompt_logprobs, strict=True)
        live = [each for each in gave if self._is_live(each[0].sequence)]
        events: list[DecodeEvent] = []
        size = self._capacity.block_size
        for chunk, _, logprobs in live:
            sequence = chunk.sequence
            sequence.computed += chunk.length
            if sequence.computed // size != chunk.start // size:
                self._kv.prefixes.keep(sequence)
            self._policy.charge(sequence, result.seconds, now)
            group = self._groups[sequence.request.id]
            if group.prompt is not None:
                events += group.prompt_news(chunk, logprobs, now)
        for chunk, sampled, _ in live:
            if sampled is not None:
                if chunk.start < chunk.sequence.prompt_length:
                    self._kv.admit_siblings(chunk.sequence)
                events.append(self._emit(chunk.sequence, sampled))
        return events

    def fail(self, plan: StepPlan, now: float) -> list[DecodeEvent]:
        """The pass broke: every request in it ends, with all its sequences. Its swaps are under
        way until a later result names them."""
        doomed = self._end_pass(plan)
        with self._kv.blocks.unused():
            self._drop(doomed)
            live = [c.sequence for c in plan.chunks if c.sequence.phase is not Phase.FINISHED]
            failed = dict.fromkeys(sequence.request.id for sequence in live)
            for request_id in failed:
                self.abort(request_id, now)
        return [RequestFailed(request_id) for request_id in failed]

    # -- Facts -----------------------------------------------------------------------------

    @property
    def swaps(self) -> bool:
        """Whether any KV is ever swapped."""
        return self._chooser.swaps

    @property
    def free_blocks(self) -> int:
        """KV blocks that can be allocated now."""
        return self._kv.blocks.free

    @property
    def preemptions(self) -> int:
        """Sequences that gave up their blocks, to be recomputed or swapped, since the start."""
        return self._kv.preemptions

    @property
    def counters(self) -> Counters:
        """What has happened since the start."""
        return replace(self._kv.counters, waits=self._waits, stalls=self._stalls)

    @property
    def prefixes(self) -> PrefixCounters:
        """What was found of sequences' tokens since the start."""
        return self._kv.prefixes.counters

    @property
    def opens_at(self) -> float | None:
        """After `plan` gave None: when it may give a pass without anything new from outside
        (dynamic filling only)."""
        return self._door.opens_at

    def load(self) -> Load:
        """How busy this worker is."""
        return load_of(self._kv)

    def check_integrity(self) -> None:
        """Raise RuntimeError if a block is lost or owned twice, or a sequence is out of place."""
        self._kv.check_integrity()
        placed = self._kv.placed()
        grouped = {s for group in self._groups.values() for s in group.sequences}
        ended = {s for s in self._kv.incoming if s.phase is Phase.FINISHED}
        if placed != grouped | ended | set(self._in_flight.doomed):
            raise RuntimeError("a sequence without a request, or the other way round")

    # -- Keeping the books -----------------------------------------------------------------

    def _check(self, request: Request) -> None:
        require_fit(request, self._capacity, longest_kv(request))
        if request.id in self._groups:
            raise AlreadyExists(f"request {request.id!r} is already here")

    def _begin_pass(self, plan: StepPlan, now: float) -> None:
        self._waits += not plan.chunks
        self._stalls += plan.swaps_first
        sequences = tuple([sequence for sequence, _, _, _ in plan.chunks])
        self._in_flight.begin(plan, sequences)
        if self._kv.fresh:
            self._kv.fresh.difference_update(sequences)
        self._kv.blocks.begin_pass()
        groups = self._groups
        for sequence in sequences:
            group = groups[sequence.request.id]
            if group.prompt is not None:
                group.begin_pass(sequence, now)

    def _end_pass(self, plan: StepPlan) -> list[Sequence]:
        """Close the pass. Returns those of its sequences that were aborted meanwhile."""
        _, doomed = self._in_flight.end(plan)
        self._kv.blocks.end_pass()
        return doomed

    @staticmethod
    def _is_live(sequence: Sequence) -> bool:
        """False for one that was aborted during the pass."""
        phase = sequence.phase
        if phase is _RUNNING:
            return True
        if phase is Phase.RETURNING:
            raise RuntimeError(f"sequence {sequence.id} was computed before its KV was back")
        return False

    def _let_go(self, sequence: Sequence) -> None:
        if not self._in_flight.give_up(sequence):
            self._kv.drop(sequence)

    def _drop(self, doomed: list[Sequence]) -> None:
        for sequence in doomed:
            self._kv.drop(sequence)

    def _emit(self, sequence: Sequence, sampled: Sampled) -> Output:
        """Append a token that was sampled here."""
        finish = sequence.append(sampled.token_id)
        if finish is not None:
            self._finish(sequence, finish)
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        return Output(sequence.request.id, sequence.index, (sampled.token_id,), logprobs, finish)

    def _accept(self, sequence: Sequence, token_id: int) -> list[DecodeEvent]:
        """Append a token that was sampled elsewhere and reported from there."""
        finish = sequence.append(token_id)
        if finish is None:
            return []
        self._finish(sequence, finish)
        return [Output(sequence.request.id, sequence.index, (), finish=finish)]

    def _finish(self, sequence: Sequence, finish: Finish) -> None:
        sequence.finish = finish
        self._groups.remove(sequence)
        self._kv.drop(sequence)
