from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from scheduling.blocks import BlockAllocator


def test_every_block_is_handed_out_once() -> None:
    blocks = BlockAllocator(5)
    assert sorted(blocks.allocate(2) + blocks.allocate(3)) == [0, 1, 2, 3, 4]
    assert blocks.free == 0


def test_allocating_more_than_is_free_takes_nothing() -> None:
    blocks = BlockAllocator(3)
    with pytest.raises(RuntimeError, match="4 blocks wanted, 3 free"):
        blocks.allocate(4)
    assert blocks.free == 3


def test_a_shared_block_is_free_only_after_its_last_holder_let_go() -> None:
    blocks = BlockAllocator(1)
    mine = blocks.allocate(1)
    theirs = blocks.share(mine)
    blocks.release(mine)
    assert blocks.free == 0
    blocks.release(theirs)
    assert blocks.free == 1


def test_a_block_cannot_be_released_twice_or_shared_when_free() -> None:
    blocks = BlockAllocator(2)
    mine = blocks.allocate(1)
    blocks.release(mine)
    with pytest.raises(RuntimeError, match="released twice"):
        blocks.release(mine)
    with pytest.raises(RuntimeError, match="cannot be shared"):
        blocks.share(mine)


def test_a_block_released_during_a_pass_is_not_reused_before_the_pass_ends() -> None:
    blocks = BlockAllocator(2)
    mine = blocks.allocate(1)
    blocks.begin_pass()
    blocks.release(mine)
    assert blocks.allocate(blocks.free) != mine
    blocks.end_pass()
    assert blocks.allocate(1) == mine


def keys(*names: int) -> list[bytes]:
    return [bytes([name]) for name in names]


def filled(blocks: BlockAllocator, *names: int) -> list[int]:
    """Blocks whose contents have these keys, released again."""
    mine = blocks.allocate(len(names))
    for block, key in zip(mine, keys(*names), strict=True):
        blocks.name(block, key)
    blocks.release(mine)
    return mine


def test_what_was_computed_is_found_by_its_key_while_held_and_when_free() -> None:
    blocks = BlockAllocator(4)
    first, second = blocks.allocate(2)
    blocks.name(first, b"a")
    assert blocks.find([b"a", b"b"]) == [first]
    assert blocks.idle([first]) == 0
    blocks.name(second, b"b")
    blocks.release([first, second])
    assert blocks.free == 4
    assert blocks.find([b"a", b"b"]) == [first, second]
    assert blocks.idle([first, second]) == 2
    assert blocks.share([first]) == [first]
    assert blocks.free == 3
    assert blocks.find([b"b", b"a"]) == [second, first]
    assert blocks.find([b"c", b"a"]) == []
    blocks.check_integrity([[first]])


def test_blocks_without_a_key_go_first_then_the_longest_unused_its_end_before_its_beginning() -> (
    None
):
    blocks = BlockAllocator(6)
    older, newer = filled(blocks, 1, 2), filled(blocks, 3, 4)
    assert not {*blocks.allocate(2)} & {*older, *newer}
    assert blocks.allocate(1) == older[1:]
    assert blocks.find(keys(1, 2)) == older[:1]
    assert blocks.allocate(2) == [older[0], newer[1]]
    assert blocks.find(keys(1)) == []
    assert blocks.find(keys(3, 4)) == newer[:1]


def test_a_block_that_is_used_again_is_the_last_to_go() -> None:
    blocks = BlockAllocator(2)
    first, second = *filled(blocks, 1), *filled(blocks, 2)
    blocks.release(blocks.share([first]))
    assert blocks.allocate(2) == [second, first]


def test_a_key_stays_with_the_block_that_had_it_first() -> None:
    blocks = BlockAllocator(2)
    mine, theirs = blocks.allocate(1), blocks.allocate(1)
    blocks.name(mine[0], b"a")
    blocks.name(theirs[0], b"a")
    assert blocks.find([b"a"]) == mine
    blocks.release(theirs)
    blocks.release(mine)
    blocks.check_integrity([])
    assert blocks.allocate(2) == [*theirs, *mine]


def test_a_block_on_offer_is_handed_out_without_its_key_or_shared_but_not_both() -> None:
    blocks = BlockAllocator(2)
    mine = blocks.allocate(2)
    for block, key in zip(mine, keys(1, 2), strict=True):
        blocks.name(block, key)
    blocks.offer(mine)
    assert (blocks.free, blocks.idle(mine)) == (2, 2)
    shared = blocks.share(blocks.find(keys(1)))
    assert blocks.free == 1
    taken = blocks.allocate(1)
    assert taken == mine[1:]
    assert blocks.find(keys(1)) == shared
    assert blocks.find(keys(2)) == []
    blocks.check_integrity([mine, shared, taken])


def test_a_block_is_not_found_while_it_settles() -> None:
    blocks = BlockAllocator(1)
    mine = blocks.allocate(1)
    blocks.name(mine[0], b"a")
    blocks.begin_pass()
    blocks.release(mine)
    assert blocks.find([b"a"]) == []
    blocks.end_pass()
    assert blocks.find([b"a"]) == mine


@pytest.mark.parametrize("owned", [[], [[0]], [[0, 1], [1]], [[0, 1, 2]]])
def test_integrity_check_finds_lost_and_doubly_owned_blocks(owned: list[list[int]]) -> None:
    blocks = BlockAllocator(4)
    mine = blocks.allocate(2)
    blocks.check_integrity([mine])
    with pytest.raises(RuntimeError):
        blocks.check_integrity(owned)


class Owners(RuleBasedStateMachine):
    """Random holders of a small pool."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockAllocator(8)
        self.lists: list[list[int]] = []
        self.contents: dict[int, bytes] = {}  # of each block, as last written
        self.during_pass: set[int] | None = None  # what the pass may write to

    @rule(count=st.integers(1, 8))
    def allocate(self, count: int) -> None:
        if count > self.blocks.free:
            return
        taken = self.blocks.allocate(count)
        assert not {b for blocks in self.lists for b in blocks} & set(taken)
        assert not (self.during_pass or set()) & set(taken)
        self.lists.append(taken)
        for block in taken:
            self.contents.pop(block, None)

    @precondition(lambda self: self.lists)
    @rule(data=st.data(), key=st.sampled_from(keys(*range(6))))
    def fill(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(self.lists))[-1]
        if block not in self.contents:
            self.contents[block] = key
            self.blocks.name(block, key)

    @rule(wanted=st.lists(st.sampled_from(keys(*range(6))), unique=True, max_size=3))
    def find(self, wanted: list[bytes]) -> None:
        free, found = self.blocks.free, self.blocks.find(wanted)
        assert [self.contents[block] for block in found] == wanted[: len(found)]
        idle = self.blocks.idle(found)
        if found:
            self.lists.append(self.blocks.share(found))
        assert self.blocks.free == free - idle

    @precondition(lambda self: self.lists)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.lists))
        self.lists.append(self.blocks.share(blocks[:2]))

    @precondition(lambda self: self.lists)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.lists) - 1))
        self.blocks.release(self.lists.pop(index))

    @rule()
    def switch(self) -> None:
        if self.during_pass is None:
            self.blocks.begin_pass()
            self.during_pass = {b for blocks in self.lists for b in blocks}
        else:
            self.blocks.end_pass()
            self.during_pass = None

    @invariant()
    def nothing_is_lost(self) -> None:
        self.blocks.check_integrity(self.lists)


TestOwners = Owners.TestCase
TestOwners.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
