"""KV swapped ahead of need, beside the passes (FastServe section 4.2).

Out goes the running sequence with the largest estimated next scheduled time: for the first one
that found no room, and to keep a share of the pool free for bursts. In comes the smallest, if it
will run soon and the share stays free.

Nothing goes back and forth: what has come in stays until it has run (unless somebody grows), and
nothing comes in while others go out or somebody waits for room.
"""

from __future__ import annotations

from itertools import islice
from operator import itemgetter

from scheduling.choosing import Chooser
from scheduling.order import Policy
from scheduling.plan import Capacity
from scheduling.residency import Residency
from scheduling.rules import Rules
from scheduling.sequence import Phase, Sequence

_FLIGHT_SHARE = 8  # unfinished swaps have at most one block in so many, and one swap more
_REFILL = 1.5  # reserves: free when the refill of a reserve ends, so that it is not begun often
_PAUSE = 8  # plans without a look at who could be swapped for the reserve, after each look
_SOON = 2  # batches: who is in one of the next so many, by rank, runs soon

_TIME = itemgetter(0)
_RUNNING, _LEAVING = Phase.RUNNING, Phase.LEAVING


class ProactiveSwaps:
    """Begins swaps at each plan, after the pass was chosen."""

    def __init__(
        self,
        capacity: Capacity,
        rules: Rules,
        policy: Policy,
        residency: Residency,
        chooser: Chooser,
    ) -> None:
        self._slots = capacity.max_sequences
        self._policy = policy
        self._kv = residency
        self._chooser = chooser
        self._reserve = rules.reserve(capacity)
        self._pause = 0
        self._in_flight = max(1, capacity.blocks // _FLIGHT_SHARE)

    def begin(self, ranked: list[Sequence], chosen: list[Sequence], now: float) -> list[Sequence]:
        """Begin swaps. Returns `chosen` with the next best in the place of those that leave."""
        kv, head = self._kv, self._chooser.head
        if kv.swaps.blocks >= self._in_flight:
            return chosen
        free = kv.blocks.free + kv.swaps.coming_free()
        if head is not None:
            if self._chooser.can_give_way_to(head, free):
                self._make_room(head, ranked, free, now)
        elif self._pause:
            self._pause -= 1
        elif free < self._reserve:
            self._refill_reserve(set(chosen), ranked, now)
        elif kv.swapped and not kv.swaps.outs:
            self._prefetch(ranked, now)
        stay = [s for s in chosen if s.phase is not _LEAVING]
        if len(stay) == len(chosen):
            return chosen
        before = set(chosen)
        spare = (s for s in ranked if s.phase is _RUNNING and s not in before)
        return [*stay, *islice(spare, self._slots - len(stay))]

    def _make_room(self, head: Sequence, ranked: list[Sequence], free: int, now: float) -> None:
        """Swap out worse-ranked ones for the best of those that found no room."""
        when = self._policy.next_run(ranked, self._slots, now)
        place = ranked.index(head)
        timed = zip(when[place:], ranked[place:], strict=True)
        later = sorted(((t, s) for t, s in timed if s.phase is _RUNNING), key=_TIME)
        for sequence in self._chooser.victims_for(head, free, [s for _, s in later]):
            if self._kv.swaps.blocks >= self._in_flight:
                return
            self._kv.swap_out(sequence, now)

    def _refill_reserve(self, running: set[Sequence], ranked: list[Sequence], now: float) -> None:
        """Swap out those that will not run for longest, until more than the reserve is free."""
        kv = self._kv
        if len(kv.running) <= len(running):
            return
        when = self._policy.next_run(ranked, self._slots, now)
        idle = [
            (time, s)
            for time, s in zip(when, ranked, strict=True)
            if s.phase is _RUNNING and time > 0 and s not in running and s not in kv.fresh
        ]
        idle.sort(key=_TIME)
        missing = int(_REFILL * self._reserve) - kv.blocks.free - kv.swaps.coming_free()
        while missing > 0 and idle and kv.swaps.blocks < self._in_flight:
            time, sequence = idle.pop()
            if kv.swaps.has_room(sequence) and time > kv.swaps.there_and_back(sequence):
                missing -= kv.gain(sequence)
                kv.swap_out(sequence, now)
        self._pause = _PAUSE

    def _prefetch(self, ranked: list[Sequence], now: float) -> None:
        """Swap in those that will run soonest, as long as the reserve stays free."""
        kv, soon = self._kv, ranked[: self._slots * _SOON]
        reserve = max(0, self._reserve - kv.headroom)  # besides what is left over anyway
        if kv.blocks.free <= reserve + kv.headroom:
            return
        if not any(s.phase is Phase.SWAPPED for s in soon):
            return
        when = self._policy.next_run(soon, self._slots, now)
        timed = zip(when, soon, strict=True)
        nearest = sorted(((t, s) for t, s in timed if s.phase is Phase.SWAPPED), key=_TIME)
        for _, sequence in nearest:
            if kv.swaps.blocks >= self._in_flight:
                return
            if kv.shortage(sequence, kv.blocks.free - reserve) > 0:
                self._pause = _PAUSE
                return
            kv.swap_in(sequence, now)
