"""Who holds which KV block, and which blocks hold something that can be used again.

Knows numbers, and keys that stand for contents: nothing of what a key means, nor of sequences.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class BlockAllocator:
    """Hands out blocks 0 .. total - 1 and counts the holders of each.

    A list of blocks that `allocate` or `share` was called for is owned by the caller, who gives it
    back through `release` exactly once. Between `begin_pass` and `end_pass` released blocks are
    not handed out again: the pass may still be writing to them. Where several passes run at a time
    that holds until all that had begun by then have ended. Blocks on `offer` may be allocated to a
    second holder, who writes to them when the first one has read them; until `begin_pass`.

    A block may be given a key, when its contents will not change any more. From then on others
    find it, while it is held and while it is free, until it is allocated again: those without a key
    go first, then those that have been free for longest.
    """

    def __init__(self, total: int) -> None:
        self._holders = [0] * total
        self._free = list(range(total - 1, -1, -1))  # without a key: a stack, lowest number on top
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, with a key; oldest first
        self._settling: deque[tuple[int, int]] = deque()  # a pass that must end first, and a block
        self._begun = self._ended = 0  # passes
        self._unused = False  # what is released now was in no pass that runs
        self._offered: dict[int, None] = {}
        self._keys: dict[int, bytes] = {}  # by block
        self._blocks: dict[bytes, int] = {}  # by key
        self.shared = 0  # holders beyond the first, of all blocks together
        self.offers_taken = 0  # since the last pass began

    @property
    def total(self) -> int:
        """All blocks."""
        return len(self._holders)

    @property
    def free(self) -> int:
        """Blocks that can be allocated now, those with a key and those on offer included."""
        return len(self._free) + len(self._kept) + len(self._offered)

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
            block, _ = self._offered.popitem()
            self._forget(block)
            self.shared += 1
            blocks.append(block)
            self.offers_taken += 1
        left = max(0, len(self._free) - count + len(blocks))
        blocks += self._free[left:][::-1]  # as one `pop` after the other
        del self._free[left:]
        while len(blocks) < count:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
            blocks.append(block)
        for block in blocks:
            self._holders[block] += 1
        return blocks

    def offer(self, blocks: Iterable[int]) -> None:
        """Let those of `blocks` that have one holder be allocated to another beside it."""
        self._offered.update(dict.fromkeys(self.sole(blocks)))

    def sole(self, blocks: Iterable[int]) -> list[int]:
        """Those of `blocks` that have one holder: free when it releases them."""
        return [block for block in blocks if self._holders[block] == 1]

    def share(self, blocks: Sequence[int]) -> list[int]:
        """Become one more holder of blocks that somebody holds, or that `find` has found."""
        for block in blocks:
            if self._holders[block]:
                self._offered.pop(block, None)  # whoever took it would write to it
                self.shared += 1
            elif block in self._kept:
                del self._kept[block]
            else:
                raise RuntimeError(f"block {block} is free and cannot be shared")
            self._holders[block] += 1
        return list(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Stop holding `blocks`; those without holders become free, after the passes that run.
        Of those with a key the last one will be the first to be allocated again: a prefix is of
        use without what follows it, and not the other way round."""
        settles = self._begun > self._ended and not self._unused
        for block in reversed(blocks):
            if not self._holders[block]:
                raise RuntimeError(f"block {block} is released twice")
            self._holders[block] -= 1
            if self._holders[block]:
                self.shared -= 1
            elif settles:
                self._settling.append((self._begun, block))
            else:
                self._put_back(block)

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
            self._put_back(self._settling.popleft()[1])

    # -- Contents --------------------------------------------------------------------------

    def name(self, block: int, key: bytes) -> None:
        """The contents of a held block are final from now on, and `key` stands for them. Nothing
        changes if another block has that key: one is enough."""
        if self._blocks.setdefault(key, block) == block:
            self._keys[block] = key

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the first keys, up to one that is not here. `share` them before anything
        else changes, or forget them."""
        found: list[int] = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None or not (self._holders[block] or block in self._kept):
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of these, which `find` has found, count as free until they are shared."""
        return sum(not self._holders[block] or block in self._offered for block in blocks)

    def _put_back(self, block: int) -> None:
        if block in self._keys:
            self._kept[block] = None
        else:
            self._free.append(block)

    def _forget(self, block: int) -> None:
        """It will be written to."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._blocks[key]

    # -- Checks ----------------------------------------------------------------------------

    def check_integrity(self, owned: Iterable[Sequence[int]]) -> None:
        """Every block is either free or held exactly by the lists in `owned`, and has at most one
        key, which is its own; else RuntimeError."""
        holders = Counter(block for blocks in owned for block in blocks)
        settling = [block for _, block in self._settling]
        idle = Counter([*self._free, *self._kept, *settling])
        for block, count in enumerate(self._holders):
            if count != holders[block] or (count == 0) != (idle[block] == 1) or idle[block] > 1:
                raise RuntimeError(
                    f"block {block}: {count} holders counted, {holders[block]} found, "
                    f"{idle[block]} times free"
                )
        if self.shared != sum(count - 1 for count in self._holders if count > 1):
            raise RuntimeError(f"{self.shared} more holders than held blocks, which is wrong")
        if {block: key for key, block in self._blocks.items()} != self._keys:
            raise RuntimeError("a block and its key do not know each other")
        if not self._kept.keys() <= self._keys.keys() or not self._keys.keys().isdisjoint(
            self._free
        ):
            raise RuntimeError("a free block is on the wrong list for its key")
