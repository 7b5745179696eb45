"""Which sequences make up the next pass, who is let in for it, and who gives way.

Slots go by rank. A waiting or swapped sequence needs blocks; nobody overtakes one for which there
is no room. Two reasons take blocks from somebody:

- Growth. A generating sequence crosses into a new block and none is free: the worst-ranked running
  one gives way, by recomputation or by a swap that the pass waits for.
- Rank, if there is a host pool: worse-ranked running ones are swapped out for the first one without
  room. Reactive: the pass waits for the swaps. Proactive: it goes on without that one, see
  scheduling/proactive.py. Their KV is never thrown away for this, so nothing is computed twice.
"""

from __future__ import annotations

from itertools import islice

from scheduling.budget import batching
from scheduling.cost import CostTracker
from scheduling.filling import Door
from scheduling.in_flight import InFlight
from scheduling.plan import Capacity, Chunk
from scheduling.residency import Residency
from scheduling.rules import Rules
from scheduling.sequence import Phase, Sequence

_RUNNING = Phase.RUNNING


class Chooser:
    """Decides; the residency carries it out."""

    def __init__(
        self,
        capacity: Capacity,
        rules: Rules,
        cost: CostTracker,
        residency: Residency,
        door: Door,
        in_flight: InFlight[Sequence],
    ) -> None:
        self._capacity = capacity
        self._rules = rules
        self._cost = cost
        self._kv = residency
        self._door = door
        self._in_flight = in_flight
        self._batching = batching(rules.batching)
        # Whether any KV is ever swapped.
        self.swaps = rules.preemption != "recompute" and capacity.host_blocks > 0
        self._reactive = self.swaps and rules.swapping == "reactive"
        # Running ones that go before whoever is looked at, where only those count.
        self._ahead: list[Sequence] | None = None
        self._now = 0.0
        self.ranked: list[Sequence] = []  # what the last choice was made of, best first
        self._residents: list[Sequence] | None = None  # running ones, worst last; made on demand
        self.head: Sequence | None = None  # the first one for which there is no room
        self.gave_way = False  # somebody has, since the last choice
        self.chosen: list[Sequence] = []  # the last choice, best first

    @property
    def proactive(self) -> bool:
        """Whether KV is swapped ahead of need."""
        return self.swaps and not self._reactive

    def choose(self, ranked: list[Sequence], now: float) -> list[Sequence]:
        """The sequences of the next pass, best first. `ranked`: those that run, wait or are
        swapped out, best first, and are in no pass. Waiting ones are admitted on the way while the
        pass has tokens left for them. Of those that run it takes its share: see
        scheduling/in_flight.py."""
        self.ranked, self._residents, self._now = ranked, None, now
        self._ahead = [] if self.swaps else None
        self.head = None
        self.gave_way = False
        self._kv.head_blocked = False
        stuck = self._stuck()
        # Counted when it is first asked for: before that only who comes back can change it.
        left = self._tokens_for_prompts(stuck) if self._kv.swapped else None
        slots, ahead = self._capacity.max_sequences, self._ahead
        share = self._in_flight.share(len(self._kv.running))
        chosen: list[Sequence] = []
        for sequence in ranked:
            if len(chosen) == slots:
                break
            tokens = len(sequence.tokens)
            generating = tokens - sequence.computed == 1 and tokens > sequence.prompt_length
            running = sequence.phase is _RUNNING
            if running and ahead is not None:
                ahead.append(sequence)
            if not generating:
                left = self._tokens_for_prompts(stuck) if left is None else left
                if left <= 0:
                    continue
            if running:
                ready = share > 0 and sequence is not stuck
                share -= ready
            elif self._kv.head_blocked:
                continue  # nobody overtakes
            else:
                ready = self._let_in(sequence)
            if ready:
                chosen.append(sequence)
                if not generating and left is not None:
                    left -= tokens - sequence.computed
        self._residents, self.chosen = None, chosen
        return chosen

    def fill(self, chosen: list[Sequence]) -> tuple[Chunk, ...]:
        """The chunks of the chosen sequences. Only those that will sample a token in this pass may
        take blocks from others."""
        generating: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in chosen:
            tokens = len(sequence.tokens)
            generates = tokens - sequence.computed == 1 and tokens > sequence.prompt_length
            (generating if generates else prompts).append(sequence)
        if prompts and self._rules.batching == "prefill-first":
            generating = []
        ready = self.growing(generating, self._capacity.max_tokens)
        if len(ready) < len(generating) and self.proactive:
            spare = self._capacity.max_sequences - len(prompts) - len(ready)
            ready += self.instead(chosen, spare)
        if prompts:
            here = (Phase.RUNNING, Phase.RETURNING)  # the others have just given way
            prompts = [s for s in prompts if s.phase in here]
        return self._batching(ready, prompts, self._capacity.max_tokens)

    def growing(self, chosen: list[Sequence], most: int) -> list[Sequence]:
        """Those of the chosen generating sequences, up to `most`, that have the block for their
        newest token, or get it by `grow`."""
        size, ready = self._capacity.block_size, list[Sequence]()
        for sequence in chosen:
            if len(ready) == most:
                break
            if (
                sequence.phase is _RUNNING
                and not sequence.allotment
                and len(sequence.tokens) <= len(sequence.blocks) * size
            ) or self.grow(sequence):
                ready.append(sequence)
        if self._rules.ahead:
            self._kv.reach(ready)
        return ready

    def grow(self, sequence: Sequence) -> bool:
        """Give a chosen generating sequence the block for its newest token, taking it from the
        worst-ranked running one if need be. False if only better ones are left: they go first."""
        if sequence.phase is not Phase.RUNNING:
            return sequence.phase is Phase.RETURNING  # with this plan; else it has just given way
        while not self._kv.grow(sequence):
            if self._kv.blocks.settling or (self._kv.swaps.outs and self._kv.swaps.coming_free()):
                return False  # blocks are on their way
            victim = self._worst()
            if victim is None or victim is sequence:
                return False
            self._give_way(victim)
        return True

    def instead(self, chosen: list[Sequence], count: int) -> list[Sequence]:
        """Up to `count` generating sequences that need no block, for the places of those that have
        to wait for one that is on its way."""
        taken = set(chosen)
        others = (
            s
            for s in self.ranked
            if s.phase is _RUNNING
            and s.generating
            and s not in taken
            and not self._kv.lacks_block(s)
        )
        return list(islice(others, count))

    # -- Letting in --------------------------------------------------------------------------

    def _let_in(self, sequence: Sequence) -> bool:
        """Whether a sequence without blocks has got some and can run in this pass."""
        kv = self._kv
        if kv.head_blocked:
            return False
        if sequence.phase is Phase.SWAPPED:
            let_in = kv.swap_in(sequence, self._now, self._ahead) or (
                self._make_room(sequence) and kv.swap_in(sequence, self._now, self._ahead)
            )
            ready = let_in and self._reactive
        elif not self._may_enter(sequence):
            return False
        else:
            let_in = ready = kv.admit(sequence, self._ahead) or (
                self._make_room(sequence) and kv.admit(sequence, self._ahead)
            )
        if not let_in:
            kv.head_blocked = True
            self.head = sequence
        elif self._ahead is not None:
            self._ahead.append(sequence)
        return ready

    def _may_enter(self, sequence: Sequence) -> bool:
        """False for one that is on its way out, or that waits for something but blocks."""
        return (
            sequence.phase is Phase.WAITING
            and self._door.lets_in(sequence)
            and not self._kv.prompts.is_coming(sequence)
        )

    def _tokens_for_prompts(self, stuck: Sequence | None) -> int:
        """Tokens of the pass that are left when everybody who generates has one."""
        most = self._capacity.max_tokens
        if self._rules.batching == "prefill-first":
            return most
        generating, slots, running = 0, self._capacity.max_sequences, self._kv.running
        if self._in_flight:
            slots = min(slots, self._in_flight.share(len(running)))
            running = {s: None for s in running if s not in self._in_flight.members}
        for sequence in running:
            tokens = len(sequence.tokens)
            if tokens - sequence.computed == 1 and tokens > sequence.prompt_length:
                generating += sequence is not stuck
                if generating == slots:
                    break
        return most - generating

    def _stuck(self) -> Sequence | None:
        """The worst-ranked running sequence, if it lacks a block while none is free for it. It has
        nobody to take one from, so its slot and its token go to others."""
        kv = self._kv
        if not kv.running or kv.reservations.room(kv.blocks.free) > 0:
            return None
        worst = self._worst()
        if worst is None or not kv.lacks_block(worst):
            return None
        return worst if kv.reservations.free_for(worst, kv.blocks.free) < 1 else None

    # -- Giving way --------------------------------------------------------------------------

    def _worst(self) -> Sequence | None:
        """The worst-ranked running sequence."""
        if self._residents is None:
            self._residents = [s for s in self.ranked if s.phase is _RUNNING]
        while self._residents and self._residents[-1].phase is not _RUNNING:
            self._residents.pop()
        return self._residents[-1] if self._residents else None

    def _give_way(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence, now."""
        self.gave_way = True
        swaps = self._kv.swaps
        if (
            self.swaps
            and swaps.has_room(sequence)
            and (self._rules.preemption == "swap" or swaps.costs_less(sequence, self._cost.model))
        ):
            self._swap_out_first(sequence)
        else:
            self._kv.evict(sequence)

    def _swap_out_first(self, sequence: Sequence) -> None:
        """Swap it out before the pass computes: the pass may use its blocks."""
        self._kv.swap_out(sequence, self._now)
        self._kv.blocks.offer(sequence.blocks)

    def _make_room(self, head: Sequence) -> bool:
        """Reactive: swap out worse-ranked running sequences until there is room for `head`. False,
        and nothing done, if all of them together would not do."""
        if not self._reactive:
            return False
        worse = self.ranked[self.ranked.index(head) + 1 :]
        victims = self.victims_for(head, self._kv.blocks.free, worse)
        for victim in victims:
            self._swap_out_first(victim)
        return bool(victims)

    def can_give_way_to(self, head: Sequence, free: int) -> bool:
        """Whether there is a use in looking for victims: somebody that runs is ranked worse than
        `head`, and it needs more than `free` blocks. Cheap."""
        if self._kv.shortage(head, free, self._ahead) <= 0:
            return False
        for sequence in reversed(self.ranked):
            if sequence is head:
                return False
            if sequence.phase is _RUNNING:
                return True
        return False

    def victims_for(self, head: Sequence, free: int, candidates: list[Sequence]) -> list[Sequence]:
        """Running sequences whose blocks and `free` others are room for `head`, from the end of
        `candidates`, which all come after it; none if there are not enough. Only such as have run
        since they came back, and have room in the host pool."""
        kv = self._kv
        host = kv.swaps.host.free
        shortage = kv.shortage(head, free, self._ahead)
        keeping = frozenset(kv.known(head))
        victims: list[Sequence] = []
        for sequence in reversed(candidates):
            if shortage <= 0:
                break
            if sequence.phase is not _RUNNING or sequence in kv.fresh:
                continue
            needed = self._capacity.blocks_for(sequence.computed)
            if 0 < needed <= host:
                host -= needed
                shortage -= kv.gain(sequence, keeping)
                victims.append(sequence)
        return victims if shortage <= 0 else []
