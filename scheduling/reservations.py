"""How much KV memory is spoken for: what a sequence may still take, before it has taken it.

Blocks are taken when they are needed; what is reserved only decides who is let in.

- "paged": nothing is reserved. A block for each sequence that runs is left over, so that what
  comes in is not thrown out again as soon as the others grow.
- "reserve-max" (Orca): up to the longest output. Nobody ever has to give way.
- "reserve-sum" (S3): up to the allotment, the upper end of the predicted length.
- "reserve-predicted": the expected outputs, but not summed up: as much as the sequences together
  will hold at their peak (scheduling/forecast.py).

The supervisor (S3): a sequence that outlives its allotment has it doubled, or as far as there is
room. Nobody gives way to a reservation, only to a block that is needed now: the memory that a
doubled allotment asks for is not in use yet, and the others may end before it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from scheduling.blocks import BlockAllocator
from scheduling.forecast import peak_kv
from scheduling.plan import Capacity
from scheduling.sequence import Sequence

Admission = Literal["paged", "reserve-predicted", "reserve-sum", "reserve-max"]


class Reservations:
    """What the sequences that hold device blocks, or will in a moment, may still take.

    `enter` when a sequence gets blocks, `note` when it has got more, `leave` when it loses them
    or will grow no more.
    """

    def __init__(self, capacity: Capacity, rule: Admission, blocks: BlockAllocator) -> None:
        self._capacity = capacity
        self._blocks = blocks
        self._rule = rule
        self._summed = rule in ("reserve-max", "reserve-sum")
        self._outstanding: dict[Sequence, int] = {}  # blocks each may still take
        self.total = 0  # the sum of those
        self.mispredictions = 0  # sequences that outlived their first allotment, since the start

    # -- Allotments ------------------------------------------------------------------------

    def allot(self, sequence: Sequence) -> None:
        """Set the allotment of a new sequence. It stays 0 where nothing is known of its length."""
        request = sequence.request
        if self._rule == "reserve-max":
            sequence.allotment = request.stopping.max_tokens
        elif self._rule != "paged" and request.estimate is not None:
            most = request.stopping.max_tokens
            sequence.allotment = max(1, min(request.estimate.allotment, most))
        self.resubmit(sequence)  # earlier attempts may have outgrown it

    @staticmethod
    def outgrown(sequence: Sequence) -> bool:
        """True when it has used up its allotment and goes on."""
        return 0 < sequence.allotment <= sequence.generated

    def enlarge(self, sequence: Sequence, room: int) -> None:
        """Double the allotment of a resident sequence that has outgrown it; `room` blocks are
        neither taken nor reserved. Where reservations are summed up it may get less, but at least
        the rest of its last block."""
        blocks = max(self._end(sequence), len(sequence.blocks))
        fits = (blocks + room) * self._capacity.block_size + 1 - sequence.prompt_length
        self._double(sequence)
        if self._summed:
            sequence.allotment = min(sequence.allotment, fits)
        self.note(sequence)

    def resubmit(self, sequence: Sequence) -> None:
        """It has lost its place: if it had outgrown its allotment, it comes back with another."""
        while self.outgrown(sequence):
            self._double(sequence)

    def _double(self, sequence: Sequence) -> None:
        request = sequence.request
        if request.estimate and sequence.allotment <= request.estimate.allotment:
            self.mispredictions += 1
        sequence.allotment = min(2 * sequence.allotment, request.stopping.max_tokens)

    # -- Who holds what --------------------------------------------------------------------

    def enter(self, sequence: Sequence) -> None:
        """It holds blocks from now on."""
        self._outstanding[sequence] = 0
        self.note(sequence)

    def note(self, sequence: Sequence) -> None:
        """It has got more blocks, or another allotment."""
        if sequence.allotment:
            outstanding = max(0, self._end(sequence) - len(sequence.blocks))
            self.total += outstanding - self._outstanding[sequence]
            self._outstanding[sequence] = outstanding

    def leave(self, sequence: Sequence) -> None:
        """It takes no more blocks. Idempotent."""
        if sequence in self._outstanding:
            self.total -= self._outstanding.pop(sequence)

    def free_for(self, sequence: Sequence, free: int) -> int:
        """How many of `free` blocks it may take now, without taking what others count on."""
        if not self._summed:
            return free
        return free - self.total + self._outstanding[sequence]

    def room(self, free: int) -> int:
        """How many of `free` blocks nobody counts on."""
        return free - (self.total if self._summed else 0)

    def held_for(self, sequence: Sequence) -> int:
        """How many blocks count as taken because this resident may still take them."""
        return self._outstanding[sequence] if self._summed else 0

    def shortage(
        self,
        sequence: Sequence,
        needed: int,
        shared: int,
        free: int,
        among: Collection[Sequence] | None = None,
    ) -> int:
        """How many more than `free` blocks there must be to let in a sequence that takes `needed`
        at once and shares `shared` others; 0 or less if there are enough. A forecast is for those
        in `among` only, where given: the others will give way to the newcomer."""
        if not sequence.allotment:
            return needed - self.room(free)
        all_of_it = max(needed, self._end(sequence) - shared)
        if self._summed:
            return all_of_it - self.room(free)
        if needed > free or all_of_it + self.total <= free or not self._outstanding:
            return needed - free
        return max(needed - free, self._capacity.blocks_for(self.excess(sequence, among)))

    def excess(self, newcomer: Sequence, among: Collection[Sequence] | None = None) -> int:
        """By how many tokens the peak of all that are here (or of those `among` them) and a
        newcomer exceeds the pool. The last block of each counts as half full.

        What a sequence has from others is theirs. Where it is nobody's any more, since who computed
        it has ended, it is as if it stayed to the end."""
        size = self._capacity.block_size
        half, held, remaining = size // 2, [], []
        for sequence in (*(self._outstanding if among is None else among), newcomer):
            held.append(len(sequence.tokens) - sequence.cached + half)
            remaining.append(max(half, self._expected(sequence) - sequence.generated))
        inherited = sum(s.cached for s in self._outstanding) - self._blocks.shared * size
        return peak_kv(held, remaining) + max(0, inherited) - self._capacity.blocks * size

    @staticmethod
    def _expected(sequence: Sequence) -> int:
        """Output tokens that it counts with in the peak. Not its allotment: that is what hardly
        any output exceeds, and of many together as many end before what is expected as after it.
        One that has outlived it, or that nothing is known of, counts as if it ended soon."""
        estimate = sequence.request.estimate
        return 0 if estimate is None else min(estimate.tokens, sequence.allotment)

    def _end(self, sequence: Sequence) -> int:
        """Blocks it holds when it has used up its allotment: the KV of the last token is never
        computed."""
        return self._capacity.blocks_for(sequence.prompt_length + sequence.allotment - 1)

    # -- Checks ----------------------------------------------------------------------------

    def check_integrity(self, holders: Iterable[Sequence], free: int) -> None:
        """Raise RuntimeError if the books differ from what `holders` hold, or if more is promised
        than the `free` blocks."""
        if set(self._outstanding) != set(holders):
            raise RuntimeError("reservations of sequences that hold no blocks, or none of some")
        ends = (max(0, self._end(s) - len(s.blocks)) for s in self._outstanding if s.allotment)
        if sum(ends) != self.total:
            raise RuntimeError(f"{self.total} blocks reserved, which is not the sum of all")
        if self._summed and self.total > free:
            raise RuntimeError(f"{self.total} blocks reserved, {free} free")
