"""Who holds which KV block.

Knows numbers only: nothing of what is in a block, nor of sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockAllocator:
    """Hands out blocks 0 .. total - 1 and counts the holders of each.

    A list of blocks that `allocate` or `share` was called for is owned by the caller, who gives it
    back through `release` exactly once. Between `begin_pass` and `end_pass` released blocks are
    not handed out again: the pass may still be writing to them.
    """

    def __init__(self, total: int) -> None:
        self._holders = [0] * total
        self._free = list(range(total - 1, -1, -1))  # a stack, lowest number on top
        self._settling: list[int] = []  # released during the pass
        self._in_pass = False

    @property
    def total(self) -> int:
        """All blocks."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks. Callers look at `free` first: being short is a RuntimeError."""
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> list[int]:
        """Become one more holder of blocks that somebody holds."""
        for block in blocks:
            if not self._holders[block]:
                raise RuntimeError(f"block {block} is free and cannot be shared")
            self._holders[block] += 1
        return list(blocks)

    def release(self, blocks: Iterable[int]) -> None:
        """Stop holding `blocks`; those without holders become free, after the pass if one runs."""
        for block in blocks:
            if not self._holders[block]:
                raise RuntimeError(f"block {block} is released twice")
            self._holders[block] -= 1
            if not self._holders[block]:
                (self._settling if self._in_pass else self._free).append(block)

    def begin_pass(self) -> None:
        """From now on released blocks are kept back."""
        self._in_pass = True

    def end_pass(self) -> None:
        """Nothing writes any more: what was released during the pass is free."""
        self._in_pass = False
        self._free += self._settling
        self._settling.clear()

    def check_integrity(self, owned: Iterable[Sequence[int]]) -> None:
        """Every block is either free or held exactly by the lists in `owned`; else RuntimeError."""
        holders = Counter(block for blocks in owned for block in blocks)
        idle = Counter([*self._free, *self._settling])
        for block, count in enumerate(self._holders):
            if count != holders[block] or (count == 0) != (idle[block] == 1) or idle[block] > 1:
                raise RuntimeError(
                    f"block {block}: {count} holders counted, {holders[block]} found, "
                    f"{idle[block]} times free"
                )
