"""Where the sequences of a decode worker are, and the KV blocks that go with each place.

                  arrive              swap out              (complete)
    INCOMING ──────────────▶ RUNNING ─────────▶ LEAVING ─────────────────┐
        │                     ▲   │  ▲                                   ▼
        │ lose          admit │   │  └──────── RETURNING ◀─────────── SWAPPED
        └──────────────▶ WAITING ◀┘  (complete)           swap in
                               evict
    and from anywhere, by drop, to FINISHED

Who is let in, brought back and sent away is decided elsewhere (scheduling/choosing.py); here it is
done, and the books are kept. Knows nothing of requests' outputs or passes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from scheduling.blocks import BlockAllocator
from scheduling.plan import Capacity, Swap
from scheduling.prefix import BlockKeys, PrefixCache
from scheduling.reservations import Reservations
from scheduling.rules import Rules
from scheduling.sequence import Phase, Sequence
from scheduling.siblings import SharedPrompts, Siblings
from scheduling.swap import SwapBook


@dataclass(frozen=True, slots=True)
class Counters:
    """What has happened since the start."""

    recomputed: int = 0  # sequences that lost their KV
    swapped_out: int = 0  # sequences whose KV was sent to the host
    swapped_in: int = 0
    blocks_out: int = 0
    blocks_in: int = 0
    mispredictions: int = 0  # sequences that outlived the allotment predicted for them
    waits: int = 0  # plans that could run nothing because of unfinished swaps
    stalls: int = 0  # passes that computed only when their swaps were complete


class Residency:
    """The places, and the blocks."""

    def __init__(
        self,
        capacity: Capacity,
        rules: Rules,
        siblings: Siblings,
        block_keys: BlockKeys | None = None,
    ) -> None:
        """`block_keys` as in PrefixCache."""
        self._capacity = capacity
        self._ahead = int(rules.ahead)
        self.blocks = BlockAllocator(capacity.blocks)
        self.prefixes = PrefixCache(self.blocks, capacity.block_size, block_keys)
        self.reservations = Reservations(capacity, rules.admission, self.blocks)
        self.swaps = SwapBook(capacity, self.blocks)
        self.prompts = SharedPrompts(capacity.block_size, siblings)
        self.waiting: dict[Sequence, None] = {}
        self.running: dict[Sequence, None] = {}
        self.swapped: dict[Sequence, None] = {}
        self.moving: dict[Sequence, None] = {}  # LEAVING or RETURNING
        self.incoming: list[Sequence] = []  # dropped ones too, until their transfer is quiet
        self.fresh: set[Sequence] = set()  # swapped in, and not in a pass since
        self.head_blocked = False  # the next one to admit found too few free blocks
        self._unreserved = 0  # sequences that run, or will, and have no allotment
        self._recomputed = self._blocks_out = self._blocks_in = 0
        self._swapped_out = self._swapped_in = 0

    @property
    def counters(self) -> Counters:
        """What happened here; nothing is known here of passes."""
        return Counters(
            recomputed=self._recomputed,
            swapped_out=self._swapped_out,
            swapped_in=self._swapped_in,
            blocks_out=self._blocks_out,
            blocks_in=self._blocks_in,
            mispredictions=self.reservations.mispredictions,
        )

    @property
    def preemptions(self) -> int:
        """Sequences that gave up their blocks, to be recomputed or swapped."""
        return self._recomputed + self._swapped_out

    # -- New sequences and transfers ---------------------------------------------------------

    def wait(self, sequences: Iterable[Sequence]) -> None:
        """New sequences that will have to be admitted."""
        for sequence in sequences:
            self.reservations.allot(sequence)
            self.waiting[sequence] = None

    def try_reserve(self, sequence: Sequence) -> bool:
        """Give a new sequence blocks for a transfer to fill, from `sequence.cached` tokens on:
        those before are here already. False, and nothing done, if there is no room or somebody
        waits for some."""
        self.reservations.allot(sequence)
        known = self.prefixes.find(sequence)
        if self.head_blocked or self._shortage(sequence, known, self.blocks.free) > 0:
            return False
        self._give_blocks(sequence, known)
        self.prefixes.count(sequence)
        sequence.move(Phase.INCOMING)
        self.incoming.append(sequence)
        return True

    def arrive(self, sequence: Sequence) -> None:
        """The transfer has filled the blocks."""
        self.incoming.remove(sequence)
        sequence.computed = len(sequence.tokens)
        self.prefixes.keep(sequence)
        self._run(sequence)

    def lose(self, sequence: Sequence) -> None:
        """The transfer failed and is quiet."""
        self.incoming.remove(sequence)
        self._free(sequence)
        self.known(sequence)
        sequence.move(Phase.WAITING)
        self.waiting[sequence] = None

    def quiet(self, sequence: Sequence) -> None:
        """No transfer fills the blocks of this dropped sequence any more. Idempotent."""
        if sequence.phase is Phase.FINISHED and sequence in self.incoming:
            self.incoming.remove(sequence)
            self._free(sequence)

    def drop(self, sequence: Sequence) -> None:
        """The sequence has ended. Its blocks are free, unless a transfer or a swap uses them."""
        phase = sequence.phase
        sequence.move(Phase.FINISHED)
        if phase is Phase.WAITING:
            del self.waiting[sequence]
            self.head_blocked = False  # until the next choice: it may have been the head
        elif phase is Phase.INCOMING:
            self.reservations.leave(sequence)
        elif phase is Phase.RUNNING:
            self._stop(sequence)
            self._free(sequence)
        elif phase is Phase.SWAPPED:
            del self.swapped[sequence]
            self.swaps.host.release(sequence.host_blocks)
            sequence.host_blocks = []
            self.head_blocked = False
        else:
            self._abandon_swap(sequence, phase)

    def _abandon_swap(self, sequence: Sequence, phase: Phase) -> None:
        """The swap keeps its blocks; what else the sequence holds is free."""
        del self.moving[sequence]
        if phase is Phase.RETURNING:
            self._unreserved -= not sequence.allotment
            self.blocks.release(_beside_swap(sequence))
        self.fresh.discard(sequence)
        self.reservations.leave(sequence)
        sequence.blocks, sequence.host_blocks, sequence.computed = [], [], 0

    # -- Into the device and out of it -------------------------------------------------------

    @property
    def headroom(self) -> int:
        """Blocks left over when somebody is let in: one for each without a reservation that may
        grow in the next pass, so that nobody is thrown out again at once."""
        return min(self._unreserved, self._capacity.max_sequences)

    def shortage(
        self, sequence: Sequence, free: int, among: Collection[Sequence] | None = None
    ) -> int:
        """How many blocks more than `free` there must be to let it in, or back, and leave the
        headroom; 0 or less if there are enough. `among` as in Reservations.shortage."""
        return self._shortage(sequence, self.known(sequence), free, among)

    def known(self, sequence: Sequence) -> list[int]:
        """The blocks that a waiting or swapped sequence can share with others: those of its longest
        known prefix, or the full ones of its prompt if a sibling has computed them; of a swapped
        one's, not all that it has on the host. Notes in `sequence.cached` how much that is."""
        known, shared = self.prefixes.find(sequence), self.prompts.blocks(sequence)
        if len(shared) > len(known):
            known = shared
        if sequence.phase is Phase.SWAPPED:
            known = known[: len(sequence.host_blocks) - 1]
        sequence.cached = len(known) * self._capacity.block_size
        return known

    def _shortage(
        self,
        sequence: Sequence,
        known: list[int],
        free: int,
        among: Collection[Sequence] | None = None,
    ) -> int:
        """The same, for a sequence that shares the `known` blocks."""
        shared = len(known) - self.blocks.idle(known)  # the others are taken from the free ones
        needed = self._capacity.blocks_for(len(sequence.tokens)) - shared
        return self.reservations.shortage(sequence, needed, shared, free - self.headroom, among)

    def gain(self, sequence: Sequence, keeping: Collection[int] = ()) -> int:
        """By how many blocks a shortage is less when this running sequence gives way to one that
        shares the blocks of `keeping`."""
        sole = self.blocks.sole(sequence.blocks)
        if keeping:
            sole = [block for block in sole if block not in keeping]
        headroom = not sequence.allotment and self._unreserved <= self._capacity.max_sequences
        return len(sole) + self.reservations.held_for(sequence) + headroom

    def admit(self, sequence: Sequence, among: Collection[Sequence] | None = None) -> bool:
        """Give a waiting sequence blocks for all its tokens, if there is room. Those that are
        known it shares, and need not compute."""
        known = self.known(sequence)
        if self._shortage(sequence, known, self.blocks.free, among) > 0:
            return False
        self._give_blocks(sequence, known)
        self.prefixes.count(sequence)
        sequence.computed = sequence.cached
        del self.waiting[sequence]
        self._run(sequence)
        return True

    def _give_blocks(self, sequence: Sequence, known: list[int]) -> None:
        """Blocks for all its tokens. The known ones first: they may be among the free."""
        shared = self.blocks.share(known)
        needed = self._capacity.blocks_for(len(sequence.tokens)) - len(shared)
        sequence.blocks = shared + self.blocks.allocate(needed)
        sequence.kept = len(shared)
        self.reservations.enter(sequence)

    def admit_siblings(self, sequence: Sequence) -> None:
        """`sequence` has just got its prompt: let in those that wait for it, before it may end."""
        if sequence.request.sampling.n == 1:
            return
        for sibling in self.prompts.of(sequence):
            if sibling.phase is Phase.WAITING and (self.head_blocked or not self.admit(sibling)):
                return

    def evict(self, sequence: Sequence) -> None:
        """Take all its blocks from a running sequence: it waits to be recomputed. Its tokens are
        kept."""
        self._stop(sequence)
        self._free(sequence)
        self.known(sequence)
        self.reservations.resubmit(sequence)
        sequence.preemptions += 1
        self._recomputed += 1
        sequence.move(Phase.WAITING)
        self.waiting[sequence] = None

    def swap_out(self, sequence: Sequence, now: float) -> None:
        """Begin to copy the KV of a running sequence to the host, which must have room."""
        self._stop(sequence)
        self.reservations.leave(sequence)
        self.reservations.resubmit(sequence)
        sequence.preemptions += 1
        self._swapped_out += 1
        sequence.move(Phase.LEAVING)
        self.moving[sequence] = None
        self.swaps.out(sequence, now)
        self._blocks_out += len(sequence.host_blocks)

    def swap_in(
        self, sequence: Sequence, now: float, among: Collection[Sequence] | None = None
    ) -> bool:
        """Begin to copy the KV of a swapped sequence back, into blocks for all its tokens, if there
        is room. What is known on the device is not copied."""
        known = self.known(sequence)
        if self._shortage(sequence, known, self.blocks.free, among) > 0:
            return False
        self._give_blocks(sequence, known)
        self.swaps.host.release(sequence.host_blocks[: len(known)])
        sequence.host_blocks = sequence.host_blocks[len(known) :]
        del self.swapped[sequence]
        self._unreserved += not sequence.allotment
        self._swapped_in += 1
        self._blocks_in += len(sequence.host_blocks)
        sequence.move(Phase.RETURNING)
        self.moving[sequence] = None
        self.fresh.add(sequence)
        self.swaps.back(sequence, now)
        return True

    def swapped_over(self, swap: Swap) -> None:
        """The swap of a sequence that has not ended is complete."""
        sequence = swap.sequence
        del self.moving[sequence]
        if sequence.phase is Phase.LEAVING:
            sequence.blocks = []
            sequence.move(Phase.SWAPPED)
            self.swapped[sequence] = None
        else:
            sequence.host_blocks = []
            self._unreserved -= not sequence.allotment
            self._run(sequence)

    def grow(self, sequence: Sequence) -> bool:
        """Give a running sequence a block for its newest token, if it lacks one. False if no block
        is free, or others count on those that are. The supervisor looks at its allotment."""
        if self.lacks_block(sequence):
            if self.reservations.free_for(sequence, self.blocks.free) < 1:
                return False
            sequence.blocks += self.blocks.allocate(1)
            self.reservations.note(sequence)
        if sequence.allotment and self.reservations.outgrown(sequence):
            room = self.reservations.room(self.blocks.free)
            self.reservations.enlarge(sequence, max(0, room))
        return True

    def reach(self, sequences: Iterable[Sequence]) -> None:
        """Give those of the running sequences whose newest token fills their last block another one
        for the token after it, while there are more free blocks than sequences."""
        size = self._capacity.block_size
        for sequence in sequences:
            if (
                len(sequence.tokens) == len(sequence.blocks) * size
                and sequence.request.stopping.max_tokens - sequence.generated > 1
                and self.reservations.free_for(sequence, self.blocks.free) > len(self.running)
            ):
                sequence.blocks += self.blocks.allocate(1)
                self.reservations.note(sequence)

    def grow_by(self, sequence: Sequence, tokens: int) -> None:
        """Give a running sequence all the blocks that it needs to get `tokens` more tokens. There
        must be room, also in its allotment."""
        held, size = len(sequence.blocks), self._capacity.block_size
        if (end := len(sequence.tokens) + tokens - 1) > held * size:
            sequence.blocks += self.blocks.allocate(-(-end // size) - held)
            self.reservations.note(sequence)

    def lacks_block(self, sequence: Sequence) -> bool:
        """Whether its blocks are full: it has none for the newest token."""
        return len(sequence.tokens) > len(sequence.blocks) * self._capacity.block_size

    def _run(self, sequence: Sequence) -> None:
        sequence.move(Phase.RUNNING)
        self.running[sequence] = None
        self._unreserved += not sequence.allotment

    def _stop(self, sequence: Sequence) -> None:
        del self.running[sequence]
        self.fresh.discard(sequence)
        self._unreserved -= not sequence.allotment

    def _free(self, sequence: Sequence) -> None:
        self.reservations.leave(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0

    # -- Checks ----------------------------------------------------------------------------

    def placed(self) -> set[Sequence]:
        """Every sequence that is here, with the dropped ones whose transfer is not quiet."""
        return {*self.waiting, *self.running, *self.swapped, *self.moving, *self.incoming}

    def check_integrity(self) -> None:
        """Raise RuntimeError if a block is lost or owned twice, or a sequence is out of place."""
        returning = [s for s in self.moving if s.phase is Phase.RETURNING]
        own = [s.blocks for s in (*self.running, *self.incoming)]
        own += [_beside_swap(s) for s in returning]
        self.blocks.check_integrity([*own, *self.swaps.device_blocks()])
        self.swaps.check_integrity(self.swapped)
        live = [s for s in self.incoming if s.phase is Phase.INCOMING]
        free = self.blocks.free + self.blocks.settling + self.swaps.coming_free()
        self.reservations.check_integrity([*self.running, *live, *returning], free)
        if self.swaps.sequences() != set(self.moving):
            raise RuntimeError("a sequence without its swap, or the other way round")
        if self._unreserved != sum(not s.allotment for s in (*self.running, *returning)):
            raise RuntimeError("sequences without reservation miscounted")
        self._check_places()

    def _check_places(self) -> None:
        for sequence in self.running:
            held, tokens = len(sequence.blocks), len(sequence.tokens)
            # A generating sequence may still lack the block for its newest token, or have the one
            # for the next.
            if held not in {self._capacity.blocks_for(tokens + t) for t in (-1, 0, self._ahead)}:
                raise RuntimeError(f"sequence {sequence.id}: {held} blocks for {tokens} tokens")
            if sequence.phase is not Phase.RUNNING or not 0 <= sequence.computed < tokens:
                raise RuntimeError(f"sequence {sequence.id} does not belong in the batch")
        for sequence in self.waiting:
            if sequence.phase is not Phase.WAITING or sequence.blocks or sequence.computed:
                raise RuntimeError(f"sequence {sequence.id} waits with something in hand")
        for sequence in self.swapped:
            held = len(sequence.host_blocks)
            if sequence.blocks or held != self._capacity.blocks_for(sequence.computed):
                raise RuntimeError(f"sequence {sequence.id} is not where its KV is")
        for sequence in self.incoming:
            if sequence.phase not in (Phase.INCOMING, Phase.FINISHED):
                raise RuntimeError(f"sequence {sequence.id} expects no KV")


def _beside_swap(sequence: Sequence) -> list[int]:
    """The blocks of a returning sequence that its swap does not fill: those that it shares, and the
    one for tokens to come."""
    first = sequence.kept
    return sequence.blocks[:first] + sequence.blocks[first + len(sequence.host_blocks) :]
