"""KV swapped ahead of need, beside the passes (FastServe section 4.2).

Out goes the running sequence with the largest estimated next scheduled time: for the first one
that found no room, and to keep a share of the pool free for bursts. In comes the smallest, if it
will run soon and the share stays free.

Nothing goes back and forth: what has come in stays until it has run (unless somebody grows), and
nothing comes in while others go out or somebody waits for room.
"""

from __future__ import annotations

from itertools import islice

from scheduling.choosing import Chooser
from scheduling.order import Policy
from scheduling.plan import Capacity
from scheduling.residency import Residency
from scheduling.rules import Rules
from scheduling.sequence import Phase, Sequence

_FLIGHT_SHARE = 8  # unfinished swaps have at most one block in so many, and one swap more
_SOON = 2  # batches: who is in one of the next so many, by rank, runs soon


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
        self._in_flight = max(1, capacity.blocks // _FLIGHT_SHARE)

    def begin(self, ranked: list[Sequence], chosen: list[Sequence], now: float) -> list[Sequence]:
        """Begin swaps. Returns `chosen` with the next best in the place of those that leave."""
        kv, head = self._kv, self._chooser.head
        free = kv.blocks.free + kv.swaps.coming_free()
        if head is None and free >= self._reserve and not kv.swapped:
            return chosen
        if kv.swaps.blocks >= self._in_flight:
            return chosen
        running = set(chosen)
        idle = any(s not in running for s in kv.running)
        if head is None and not kv.swapped and not idle:
            return chosen
        when = self._policy.next_run(ranked, self._slots, now)
        if head is not None:
            self._make_room(head, ranked, when, free, now)
        elif free < self._reserve:
            self._refill_reserve(running, ranked, when, now)
        elif not kv.swaps.outs:
            self._prefetch(ranked, when, now)
        stay = [s for s in chosen if s.phase is not Phase.LEAVING]
        if len(stay) == len(chosen):
            return chosen
        spare = (s for s in ranked if s.phase is Phase.RUNNING and s not in running)
        return [*stay, *islice(spare, self._slots - len(stay))]

    def _make_room(
        self, head: Sequence, ranked: list[Sequence], when: list[float], free: int, now: float
    ) -> None:
        """Swap out worse-ranked ones for the best of those that found no room."""
        place = ranked.index(head)
        later = sorted(zip(when[place:], ranked[place:], strict=True), key=_latest_last)
        for sequence in self._chooser.victims_for(head, free, [s for _, s in later]):
            if self._kv.swaps.blocks >= self._in_flight:
                return
            self._kv.swap_out(sequence, now)

    def _refill_reserve(
        self, running: set[Sequence], ranked: list[Sequence], when: list[float], now: float
    ) -> None:
        """Swap out those that will not run for longest, until the reserve is free again."""
        kv = self._kv
        idle = [
            (time, s)
            for time, s in zip(when, ranked, strict=True)
            if s.phase is Phase.RUNNING and time > 0 and s not in running and s not in kv.fresh
        ]
        idle.sort(key=_latest_last)
        missing = self._reserve - kv.blocks.free - kv.swaps.coming_free()
        while missing > 0 and idle and kv.swaps.blocks < self._in_flight:
            time, sequence = idle.pop()
            if kv.swaps.has_room(sequence) and time > kv.swaps.there_and_back(sequence):
                missing -= kv.gain(sequence)
                kv.swap_out(sequence, now)

    def _prefetch(self, ranked: list[Sequence], when: list[float], now: float) -> None:
        """Swap in those that will run soonest, as long as the reserve stays free."""
        kv = self._kv
        soon = self._slots * _SOON
        nearest = sorted(
            (
                (time, s)
                for time, s in zip(when[:soon], ranked[:soon], strict=True)
                if s.phase is Phase.SWAPPED
            ),
            key=_latest_last,
        )
        for _, sequence in nearest:
            if kv.swaps.blocks >= self._in_flight:
                return
            if kv.shortage(sequence, kv.blocks.free - self._reserve) > 0:
                return
            kv.swap_in(sequence, now)


def _latest_last(item: tuple[float, Sequence]) -> float:
    return item[0]
