"""Which sequences of a decode worker hold KV blocks, which wait for some, and who gives way.

                  arrive
    INCOMING ──────────────▶ RUNNING ──┐
        │                     ▲   │    │ drop
        │ lose          admit │   │ give way
        └──────────────▶ WAITING ◀┘    ▼
                                    FINISHED

KV admission is "paged": a sequence gets blocks for the tokens it has when it is admitted, and one
more whenever generation crosses into a new block.

Knows nothing of requests' outputs, passes or time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from scheduling.blocks import BlockAllocator
from scheduling.plan import Capacity
from scheduling.sequence import Phase, Sequence

Siblings = Callable[[Sequence], Iterable[Sequence]]
"""The unfinished sequences of the same request, the sequence itself included."""


class Residency:
    """The three places where a sequence can be, and the blocks that go with them."""

    def __init__(self, capacity: Capacity, siblings: Siblings) -> None:
        self._capacity = capacity
        self._siblings = siblings
        self.blocks = BlockAllocator(capacity.blocks)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.incoming: list[Sequence] = []  # dropped ones too, until their transfer is quiet
        self.head_blocked = False  # the next one to admit found too few free blocks
        self.preemptions = 0  # since the start

    # -- Moves -----------------------------------------------------------------------------

    def wait(self, sequences: Iterable[Sequence]) -> None:
        """New sequences that will have to be admitted."""
        self.waiting += sequences

    def try_reserve(self, sequence: Sequence) -> bool:
        """Give a new sequence blocks for a transfer to fill. False, and nothing done, if there is
        no room or somebody waits for some."""
        needed = self._capacity.blocks_for(len(sequence.tokens))
        if self.head_blocked or not self._has_room(needed):
            return False
        sequence.blocks = self.blocks.allocate(needed)
        sequence.move(Phase.INCOMING)
        self.incoming.append(sequence)
        return True

    def arrive(self, sequence: Sequence) -> None:
        """The transfer has filled the blocks."""
        self.incoming.remove(sequence)
        sequence.computed = len(sequence.tokens)
        sequence.move(Phase.RUNNING)
        self.running.append(sequence)

    def lose(self, sequence: Sequence) -> None:
        """The transfer failed and is quiet."""
        self.incoming.remove(sequence)
        self._free(sequence)
        sequence.move(Phase.WAITING)
        self.waiting.append(sequence)

    def drop(self, sequence: Sequence) -> None:
        """The sequence has ended. Its blocks are free, unless a transfer is filling them."""
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
            self.head_blocked = False  # until the next choice: it may have been the head
        elif sequence.phase is Phase.RUNNING:
            self.running.remove(sequence)
            self._free(sequence)
        sequence.move(Phase.FINISHED)

    def quiet(self, sequence: Sequence) -> None:
        """No transfer fills the blocks of this dropped sequence any more. Idempotent."""
        if sequence.phase is Phase.FINISHED and sequence in self.incoming:
            self.incoming.remove(sequence)
            self._free(sequence)

    # -- Choosing --------------------------------------------------------------------------

    def choose(self, ranked: list[Sequence]) -> list[Sequence]:
        """The sequences of the next pass, best first. Waiting ones are admitted on the way while
        the pass has tokens left for them; nobody overtakes one for which there is no room."""
        chosen: list[Sequence] = []
        self.head_blocked = False
        stuck = self._stuck(ranked)
        generating = sum(s.generating for s in self.running if s is not stuck)
        left = self._capacity.max_tokens - min(generating, self._capacity.max_sequences)
        for sequence in ranked:
            if len(chosen) == self._capacity.max_sequences:
                break
            if sequence.generating:
                if sequence is not stuck:
                    chosen.append(sequence)
            elif left > 0 and (sequence.phase is Phase.RUNNING or self._admit_next(sequence)):
                chosen.append(sequence)
                left -= sequence.uncomputed
        return chosen

    def grow(self, sequence: Sequence, ranked: list[Sequence]) -> bool:
        """Give a generating sequence the block for its newest token, taking it from the
        worst-ranked running one if need be. False if only better ones are left: they go first."""
        if sequence.phase is not Phase.RUNNING:
            return False  # it gave way a moment ago
        if not self._lacks_block(sequence):
            return True
        while not self.blocks.free:
            victim = next(s for s in reversed(ranked) if s.phase is Phase.RUNNING)
            if victim is sequence:
                return False
            self._give_way(victim)
        sequence.blocks += self.blocks.allocate(1)
        return True

    def admit_siblings(self, sequence: Sequence) -> None:
        """`sequence` has just got its prompt: let in those that wait for it, before it may end."""
        for sibling in self._siblings(sequence):
            if sibling.phase is Phase.WAITING and (self.head_blocked or not self._admit(sibling)):
                return

    def _lacks_block(self, sequence: Sequence) -> bool:
        return self._capacity.blocks_for(len(sequence.tokens)) > len(sequence.blocks)

    def _stuck(self, ranked: list[Sequence]) -> Sequence | None:
        """The worst-ranked running sequence, if it lacks a block while none is free. It has nobody
        to take one from, so its slot and its token go to others."""
        if self.blocks.free or not self.running:
            return None
        worst = next(s for s in reversed(ranked) if s.phase is Phase.RUNNING)
        return worst if self._lacks_block(worst) else None

    def _admit_next(self, sequence: Sequence) -> bool:
        if self.head_blocked or self._must_wait_for_sibling(sequence):
            return False
        self.head_blocked = not self._admit(sequence)
        return not self.head_blocked

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence blocks for all its tokens, if there is room. The full blocks
        of the prompt are shared with a sibling that has computed them."""
        shared = self._prompt_of_sibling(sequence)
        needed = self._capacity.blocks_for(len(sequence.tokens)) - len(shared)
        if not self._has_room(needed):
            return False
        sequence.blocks = self.blocks.share(shared) + self.blocks.allocate(needed)
        sequence.computed = len(shared) * self._capacity.block_size
        self.waiting.remove(sequence)
        sequence.move(Phase.RUNNING)
        self.running.append(sequence)
        return True

    def _has_room(self, needed: int) -> bool:
        """One free block per running sequence is left over, so that what comes in is not thrown
        out again as soon as the others grow."""
        return self.blocks.free >= needed + len(self.running)

    def _give_way(self, sequence: Sequence) -> None:
        """Lose all blocks and wait to be recomputed; the tokens are kept."""
        self._free(sequence)
        self.running.remove(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        sequence.move(Phase.WAITING)
        self.waiting.append(sequence)

    def _free(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0

    # -- Siblings (n > 1) share the full blocks of their prompt -----------------------------

    def _shareable(self, sequence: Sequence) -> int:
        """How many blocks hold nothing but prompt, its last token excepted: each sequence
        computes at least that one itself, as its first token is sampled there."""
        return (sequence.prompt_length - 1) // self._capacity.block_size

    def _prompt_of_sibling(self, sequence: Sequence) -> list[int]:
        count = self._shareable(sequence)
        for sibling in self._siblings(sequence):
            done = sibling.computed >= count * self._capacity.block_size
            if sibling.phase is Phase.RUNNING and done:
                return sibling.blocks[:count]
        return []

    def _must_wait_for_sibling(self, sequence: Sequence) -> bool:
        """True while a sibling is on its way to a prompt that can be shared."""
        tokens = self._shareable(sequence) * self._capacity.block_size
        return any(
            s.phase is Phase.INCOMING or (s.phase is Phase.RUNNING and s.computed < tokens)
            for s in self._siblings(sequence)
        )

    # -- Checks ----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise RuntimeError if a block is lost or owned twice, or a sequence is out of place."""
        self.blocks.check_integrity(s.blocks for s in (*self.running, *self.incoming))
        for sequence in self.running:
            held, tokens = len(sequence.blocks), len(sequence.tokens)
            # A generating sequence may still lack the block for its newest token.
            if held not in {self._capacity.blocks_for(t) for t in (tokens, tokens - 1)}:
                raise RuntimeError(f"sequence {sequence.id}: {held} blocks for {tokens} tokens")
            if sequence.phase is not Phase.RUNNING or not 0 <= sequence.computed < tokens:
                raise RuntimeError(f"sequence {sequence.id} does not belong in the batch")
        for sequence in self.waiting:
            if sequence.phase is not Phase.WAITING or sequence.blocks or sequence.computed:
                raise RuntimeError(f"sequence {sequence.id} waits with something in hand")
        for sequence in self.incoming:
            if sequence.phase not in (Phase.INCOMING, Phase.FINISHED):
                raise RuntimeError(f"sequence {sequence.id} expects no KV")
