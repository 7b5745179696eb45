"""Who holds which KV block.

Knows numbers only: nothing of what is in a block, nor of sequences.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class BlockAllocator:
    """Hands out blocks 0 .. total - 1 and counts the holders of each.

    A list of blocks that `allocate` or `share` was called for is owned by the caller, who gives it
    back through `release` exactly once. Between `begin_pass` and `end_pass` released blocks are
    not handed out again: the pass may still be writing to them. Where several passes run at a time
    that holds until all that had begun by then have ended. Blocks on `offer` may be allocated to a
    second holder, who writes to them when the first one has read them; until `begin_pass`.
    """

    def __init__(self, total: int) -> None:
        self._holders = [0] * total
        self._free = list(range(total - 1, -1, -1))  # a stack, lowest number on top
        self._settling: deque[tuple[int, int]] = deque()  # a pass that must end first, and a block
        self._begun = self._ended = 0  # passes
        self._unused = False  # what is released now was in no pass that runs
        self._offered: list[int] = []
        self.offers_taken = 0  # since the last pass began

    @property
    def total(self) -> int:
        """All blocks."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """Blocks that can be allocated now, those on offer included."""
        return len(self._free) + len(self._offered)

    @property
    def settling(self) -> int:
        """Blocks that are free when the passes that run have ended."""
        return len(self._settling)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks. Callers look at `free` first: being short is a RuntimeError."""
        if count > self.free:
            raise RuntimeError(f"{count} blocks wanted, {self.free} free")
        blocks: list[int] = []
        while self._offered and len(blocks) < count:
            blocks.append(self._offered.pop())
            self.offers_taken += 1
        left = len(self._free) - count + len(blocks)
        blocks += self._free[left:][::-1]  # as one `pop` after the other
        del self._free[left:]
        for block in blocks:
            self._holders[block] += 1
        return blocks

    def offer(self, blocks: Iterable[int]) -> None:
        """Let those of `blocks` that have one holder be allocated to another beside it."""
        self._offered += self.sole(blocks)

    def sole(self, blocks: Iterable[int]) -> list[int]:
        """Those of `blocks` that have one holder: free when it releases them."""
        return [block for block in blocks if self._holders[block] == 1]

    def share(self, blocks: Sequence[int]) -> list[int]:
        """Become one more holder of blocks that somebody holds."""
        for block in blocks:
            if not self._holders[block]:
                raise RuntimeError(f"block {block} is free and cannot be shared")
            self._holders[block] += 1
        return list(blocks)

    def release(self, blocks: Iterable[int]) -> None:
        """Stop holding `blocks`; those without holders become free, after the passes that run."""
        settles = self._begun > self._ended and not self._unused
        for block in blocks:
            if not self._holders[block]:
                raise RuntimeError(f"block {block} is released twice")
            self._holders[block] -= 1
            if not self._holders[block]:
                if settles:
                    self._settling.append((self._begun, block))
                else:
                    self._free.append(block)

    @contextmanager
    def unused(self) -> Iterator[None]:
        """What is released inside was in no pass that still runs: it is free at once."""
        self._unused = True
        try:
            yield
        finally:
            self._unused = False

    def begin_pass(self) -> None:
        """From now on released blocks are kept back, and offers have lapsed."""
        self._begun += 1
        self._offered.clear()
        self.offers_taken = 0

    def end_pass(self) -> None:
        """The oldest pass writes no more: what was released before another one began is free."""
        self._ended += 1
        while self._settling and self._settling[0][0] <= self._ended:
            self._free.append(self._settling.popleft()[1])

    def check_integrity(self, owned: Iterable[Sequence[int]]) -> None:
        """Every block is either free or held exactly by the lists in `owned`; else RuntimeError."""
        holders = Counter(block for blocks in owned for block in blocks)
        idle = Counter([*self._free, *(block for _, block in self._settling)])
        for block, count in enumerate(self._holders):
            if count != holders[block] or (count == 0) != (idle[block] == 1) or idle[block] > 1:
                raise RuntimeError(
                    f"block {block}: {count} holders counted, {holders[block]} found, "
                    f"{idle[block]} times free"
                )
