"""The lease table against the drawing in its docstring."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.errors import KvTransferError, Overloaded
from kv_transfer.lease import Lease, LeaseState, LeaseTable


@pytest.fixture
def table() -> LeaseTable:
    return LeaseTable(time_to_live=30.0, max_age=100.0, max_blocks=10)


def sealed(table: LeaseTable, blocks=(4, 5), now: float = 0.0) -> bytes:
    lease = table.grant(blocks, now)
    table.finalize(lease.id, range(len(blocks)), now)
    table.seal(lease.id, now)
    return lease.id


def test_a_commit_of_a_sealed_live_lease_is_valid_and_frees_it(table):
    lease_id = sealed(table)
    assert table.release(lease_id, committed=True, now=29.9)
    assert table.take_freed() == [lease_id]
    assert table.take_freed() == []
    assert table.held_blocks == 0


def test_repeating_a_release_repeats_the_answer(table):
    lease_id = sealed(table)
    answers = [table.release(lease_id, committed=True, now=t) for t in (1.0, 2.0, 50.0)]
    assert answers == [True, True, True]
    given_up = sealed(table)
    assert not table.release(given_up, committed=False, now=1.0)
    assert not table.release(given_up, committed=True, now=2.0)


def test_a_commit_at_the_very_end_of_the_lease_is_too_late(table):
    lease_id = sealed(table)
    assert not table.release(lease_id, committed=True, now=30.0)
    assert table.find(lease_id).state is LeaseState.EXPIRED


def test_a_commit_before_the_seal_is_not_valid_but_frees(table):
    lease = table.grant([1], 0.0)
    assert not table.release(lease.id, committed=True, now=1.0)
    assert table.take_freed() == [lease.id]


def test_a_revoked_lease_cannot_be_committed(table):
    lease_id = sealed(table)
    table.revoke(lease_id, 1.0)
    table.revoke(lease_id, 1.0)
    assert not table.release(lease_id, committed=True, now=1.0)
    assert table.find(lease_id).state is LeaseState.REVOKED
    assert table.take_freed() == [lease_id]


def test_what_comes_after_the_end_is_ignored(table):
    lease = table.grant([1, 2], 0.0)
    table.revoke(lease.id, 1.0)
    assert not table.finalize(lease.id, [7], 2.0)
    assert not table.seal(lease.id, 2.0)
    assert table.renew(lease.id, 2.0) == 0.0
    assert lease.digests == []


def test_renewal_never_shortens_and_stops_at_the_oldest_age(table):
    lease_id = sealed(table)
    assert table.renew(lease_id, 1.0) == pytest.approx(29.0)
    assert table.renew(lease_id, 20.0) == pytest.approx(20.0)
    for now in range(30, 100, 10):
        table.renew(lease_id, float(now))
    assert table.renew(lease_id, 99.0) == pytest.approx(1.0)
    assert table.renew(lease_id, 100.0) == 0.0


def test_the_sweep_visits_every_lease_whatever_the_order_of_deadlines(table):
    first, second, third = (table.grant([i], float(i)) for i in range(3))
    table.renew(first.id, 25.0)
    assert table.sweep(31.5) == [second.id]
    assert table.sweep(100.0) == [first.id, third.id]


def test_an_ended_lease_is_forgotten_after_twice_the_time_to_live(table):
    lease_id = sealed(table)
    table.release(lease_id, committed=True, now=1.0)
    table.sweep(61.0)
    assert table.release(lease_id, committed=True, now=61.0)
    table.sweep(61.1)
    assert len(table) == 0
    assert not table.release(lease_id, committed=True, now=61.2)


def test_blocks_stay_held_while_a_reader_is_in_them(table):
    lease_id = sealed(table)
    assert list(table.begin_read(lease_id, 1, 1, 0.0)) == [5]
    table.revoke(lease_id, 1.0)
    table.sweep(1000.0)
    assert (table.take_freed(), table.held_blocks) == ([], 2)
    table.end_read(lease_id)
    assert (table.take_freed(), table.held_blocks) == ([lease_id], 0)


@pytest.mark.parametrize(("first", "count"), [(0, 0), (-1, 1), (0, 3), (2, 1), (1, 2**31)])
def test_only_final_positions_can_be_read(table, first, count):
    lease = table.grant([4, 5, 6], 0.0)
    table.finalize(lease.id, [1, 2], 0.0)
    with pytest.raises(KvTransferError):
        table.begin_read(lease.id, first, count, 0.0)
    assert lease.readers == 0


def test_leases_beyond_the_cap_are_refused_and_change_nothing(table):
    table.grant(range(8), 0.0)
    with pytest.raises(Overloaded):
        table.grant(range(8, 11), 0.0)
    assert table.held_blocks == 8
    table.grant(range(8, 10), 0.0)


def test_a_block_in_several_leases_counts_once_until_the_last_of_them_is_freed(table):
    first, second = (table.grant([0, 1, 2, 3, last], 0.0) for last in (4, 5))
    assert table.held_blocks == 6
    table.revoke(first.id, 1.0)
    assert table.held_blocks == 5
    table.revoke(second.id, 1.0)
    assert table.held_blocks == 0


def test_ids_are_random_and_never_drawn_twice():
    table = LeaseTable(time_to_live=1.0, max_age=1.0, max_blocks=4, new_id=lambda: b"x" * 16)
    table.grant([0], 0.0)
    with pytest.raises(RuntimeError, match="twice"):
        table.grant([0], 0.0)
    fresh = LeaseTable(time_to_live=1.0, max_age=1.0, max_blocks=4)
    assert len({fresh.grant([0], 0.0).id for _ in range(4)}) == 4


def test_a_move_that_is_not_in_the_drawing_is_a_bug():
    lease = Lease(b"", (), 0.0, 1.0)
    lease.move(LeaseState.EXPIRED)
    for state in LeaseState:
        with pytest.raises(RuntimeError):
            lease.move(state)


class LeaseMachine(RuleBasedStateMachine):
    """Random leases, readers, clocks; the books always balance and nothing is freed twice."""

    def __init__(self) -> None:
        super().__init__()
        ids = itertools.count()
        self.table = LeaseTable(
            time_to_live=10.0,
            max_age=40.0,
            max_blocks=12,
            new_id=lambda: next(ids).to_bytes(16, "big"),
        )
        self.now = 0.0
        self.leases: dict[bytes, Lease] = {}
        self.reading: list[bytes] = []
        self.freed: list[bytes] = []
        self.committed: dict[bytes, bool] = {}

    def pick(self, data: st.DataObject) -> Lease:
        return self.leases[data.draw(st.sampled_from(sorted(self.leases)))]

    def held(self) -> set[int]:
        leases = (lease for lease in self.leases.values() if lease.id not in self.freed)
        return {block for lease in leases for block in lease.blocks}

    @rule(first=st.integers(0, 12), count=st.integers(1, 6))
    def grant(self, first: int, count: int) -> None:
        blocks = range(first, first + count)
        room = len(self.held().union(blocks)) <= 12
        try:
            lease = self.table.grant(blocks, self.now)
        except Overloaded:
            assert not room
        else:
            assert room
            self.leases[lease.id] = lease

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), count=st.integers(0, 3))
    def finalize(self, data: st.DataObject, count: int) -> None:
        lease = self.pick(data)
        count = min(count, len(lease.blocks) - len(lease.digests))
        if lease.state is not LeaseState.SEALED:
            self.table.finalize(lease.id, [1] * count, self.now)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        lease = self.pick(data)
        if not lease.live or len(lease.digests) == len(lease.blocks):
            self.table.seal(lease.id, self.now)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        lease = self.pick(data)
        before = lease.expires_at
        left = self.table.renew(lease.id, self.now)
        assert lease.expires_at >= before
        assert (left > 0) == (lease.live and self.now < before)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), committed=st.booleans())
    def release(self, data: st.DataObject, committed: bool) -> None:
        lease = self.pick(data)
        expected = lease.state is LeaseState.SEALED and self.now < lease.expires_at and committed
        valid = self.table.release(lease.id, committed=committed, now=self.now)
        if committed and self.table.find(lease.id) is not None:
            assert valid == self.committed.setdefault(lease.id, expected)
        elif not committed:
            assert not valid
            self.committed.setdefault(lease.id, False)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        lease = self.pick(data)
        self.table.revoke(lease.id, self.now)
        assert not lease.live
        self.committed.setdefault(lease.id, False)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def begin_read(self, data: st.DataObject) -> None:
        lease = self.pick(data)
        try:
            self.table.begin_read(lease.id, 0, 1, self.now)
        except KvTransferError:
            assert not lease.live or not lease.digests
        else:
            assert lease.live
            assert lease.id not in self.freed
            self.reading.append(lease.id)

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def end_read(self, data: st.DataObject) -> None:
        lease_id = data.draw(st.sampled_from(sorted(self.reading)))
        self.reading.remove(lease_id)
        self.table.end_read(lease_id)

    @rule(seconds=st.floats(0.0, 25.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def sweep(self) -> None:
        self.table.sweep(self.now)
        live = [lease for lease in self.leases.values() if lease.live]
        assert all(self.now < lease.expires_at for lease in live)
        assert self.table.live == len(live)

    @invariant()
    def books_balance(self) -> None:
        self.table.check_integrity()
        self.freed += self.table.take_freed()
        assert len(self.freed) == len(set(self.freed))
        assert not set(self.freed) & set(self.reading)
        assert len(self.held()) == self.table.held_blocks

    def teardown(self) -> None:
        for lease_id in self.reading:
            self.table.end_read(lease_id)
        self.table.sweep(self.now + 1000.0)
        assert self.table.held_blocks == 0


LeaseMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
TestLeaseMachine = LeaseMachine.TestCase
