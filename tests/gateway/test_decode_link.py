"""How much is sent to a decode worker, and what routers see of it."""

from __future__ import annotations

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
    it.load = Load(running, waiting, free_blocks=4, total_blocks=10)
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
    it = busy(link(8), 3, 0)
    for left in (7, 30):
        slot = it.open(Listener(left))  # type: ignore[arg-type]
        it._reserving.discard(slot)  # the worker has answered, and counts it
    seen = it.candidate(100.0)
    assert (seen.sequences, seen.outstanding_tokens) == (3, 7 + 30 + 100)
    assert (seen.free_blocks, seen.total_blocks) == (4, 10)
    assert it.blocks_for(17) == 2
