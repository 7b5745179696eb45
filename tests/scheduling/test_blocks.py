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
        self.during_pass: set[int] | None = None  # what the pass may write to

    @rule(count=st.integers(1, 8))
    def allocate(self, count: int) -> None:
        if count > self.blocks.free:
            return
        taken = self.blocks.allocate(count)
        assert not {b for blocks in self.lists for b in blocks} & set(taken)
        assert not (self.during_pass or set()) & set(taken)
        self.lists.append(taken)

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
