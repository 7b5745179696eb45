"""How much is sent to a decode worker, and what routers see of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.types import Load
from gateway.decode_link import MAX_RESERVING, DecodeLink
from queueing.contract import Role, WorkerRecord


class Listener:
    """Holds a slot."""

    def __init__(self, left: int) -> None:
        self.left = left

    def expected_left(self, mean: float) -> int:
        return self.left


def link(batch: int | None, ahead: float = 0.5) -> DecodeLink:
    record = WorkerRecord(
        "d", 1, Role.DECODE, "a:1", "l", "m", 160, 10, 99, draining=False, batch_sequences=batch
    )
    it = DecodeLink(record, "g", lambda: None, ahead)
    it.connected = True
    return it


def busy(it: DecodeLink, running: int, waiting: int) -> DecodeLink:
    it.update(replace(it.record, load=Load(running, waiting, 4, 10)), now=1e9)
    return it


@pytest.mark.parametrize(
    ("running", "waiting", "openings"), [(0, 0, 12), (8, 0, 4), (8, 3, 1), (8, 4, 0), (8, 40, 0)]
)
def test_a_worker_is_sent_its_batch_and_a_share_of_it(running: int, waiting: int, openings: int):
    assert busy(link(8), running, waiting).openings == openings


def test_at_least_one_sequence_waits_beyond_the_batch():
    assert busy(link(8, ahead=0.0), 8, 0).openings == 1


def test_a_worker_that_does_not_say_its_batch_is_bounded_by_its_answers_only():
    it = busy(link(None), 500, 500)
    assert it.openings == MAX_RESERVING
    it.open(Listener(1))  # type: ignore[arg-type]
    assert it.openings == MAX_RESERVING - 1


def test_what_is_on_its_way_counts_as_there():
    it = busy(link(8), 8, 3)
    it.open(Listener(1))  # type: ignore[arg-type]
    assert it.openings == 0
    assert it.candidate(5.0).sequences == 12


def test_own_requests_are_counted_by_prediction_and_those_of_others_by_the_mean():
    it = link(8)
    for left in (7, 30):
        slot = it.open(Listener(left))  # type: ignore[arg-type]
        it._reserving.discard(slot)  # the worker has answered, and counts it
    busy(it, 3, 0)
    seen = it.candidate(100.0)
    assert (seen.sequences, seen.outstanding_tokens) == (3, 7 + 30 + 100)
    assert (seen.free_blocks, seen.total_blocks) == (4, 10)
    assert it.blocks_for(17) == 2


def test_a_slot_that_is_closed_makes_room_before_the_worker_says_so():
    it = link(8)
    slots = [it.open(Listener(1), sequences=4) for _ in range(3)]  # type: ignore[arg-type]
    it._reserving.clear()
    busy(it, 12, 0)
    assert it.openings == 0
    it.close(slots[0])
    assert it.openings == 4


def test_the_registry_is_believed_where_the_worker_has_been_silent():
    it = busy(link(8), 8, 4)
    it.heard_at = 100.0
    idle = replace(it.record, load=Load(0, 0, 10, 10))
    it.update(idle, now=100.4)
    assert it.openings == 0
    it.update(idle, now=100.6)
    assert it.openings == 12


def test_a_full_worker_owes_a_tenant_its_share_of_the_places():
    it = busy(link(8), 8, 4)
    assert (it.openings, it.owes("mine", tenants=4)) == (0, True)
    slots = [it.open(Listener(1), 1, "mine") for _ in range(3)]  # type: ignore[arg-type]
    assert not it.owes("mine", tenants=4)  # 3 of 12 places
    assert it.owes("mine", tenants=3) and it.owes("other", tenants=100)
    it.close(slots[0])
    assert it.owes("mine", tenants=4)


def test_nobody_is_owed_anything_where_a_worker_does_not_say_its_batch_or_does_not_answer():
    assert not link(None).owes("mine", tenants=2)
    it = link(1000)
    for _ in range(MAX_RESERVING):
        it.open(Listener(1), 1, "flood")  # type: ignore[arg-type]
    assert not it.owes("mine", tenants=2)
