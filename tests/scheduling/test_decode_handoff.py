"""The hand-off to a decode scheduler: reserved, arrived, lost, aborted."""

from __future__ import annotations

import pytest

from baton.errors import Overloaded
from baton.types import Finish, FinishReason, Load, Output
from engine.simulated import expected_tokens
from scheduling.sequence import Phase
from tests.scheduling.worker import TOKEN_OF, deliver


def test_a_reserved_sequence_holds_its_blocks_but_does_not_run(worker, make_request) -> None:
    sequence = worker.scheduler.reserve(make_request("a", prompt=9), 0.0)
    assert sequence.phase is Phase.INCOMING
    assert len(sequence.blocks) == 3
    assert worker.free == 13
    assert worker.scheduler.plan(0.0) is None


def test_after_arrival_it_generates_at_once(worker, make_request) -> None:
    request = make_request("a", prompt=9, most=4)
    sequence = worker.scheduler.reserve(request, 0.0)
    first = deliver(worker, sequence)
    assert worker.scheduler.arrived(sequence, first, 1.0) == []
    assert worker.step()[0] == {("a", 0): 1}
    worker.finish()
    assert [first, *worker.tokens[("a", 0)]] == expected_tokens(request, 0, TOKEN_OF)


def test_forks_of_a_reserved_request_join_when_its_kv_is_there(worker, make_request) -> None:
    request = make_request("a", prompt=9, most=4, n=2)
    sequence = worker.scheduler.reserve(request, 0.0)
    assert worker.scheduler.plan(0.0) is None
    first = deliver(worker, sequence)
    worker.scheduler.arrived(sequence, first, 1.0)
    assert worker.step()[0] == {("a", 0): 1, ("a", 1): 1}
    worker.finish()
    assert worker.tokens[("a", 1)] == expected_tokens(request, 1, TOKEN_OF)


def test_a_lost_hand_off_is_computed_here(worker, make_request) -> None:
    request = make_request("a", prompt=9, most=4)
    sequence = worker.scheduler.reserve(request, 0.0)
    first = expected_tokens(request, 0, TOKEN_OF)[0]
    assert worker.scheduler.lost(sequence, first, 1.0) == []
    assert worker.free == 16
    assert worker.step()[0] == {("a", 0): 8}
    worker.finish()
    assert [first, *worker.tokens[("a", 0)]] == expected_tokens(request, 0, TOKEN_OF)


@pytest.mark.parametrize("end", ["arrived", "lost"])
def test_a_first_token_can_be_the_last_one(worker, make_request, end) -> None:
    sequence = worker.scheduler.reserve(make_request("a", prompt=9, most=1), 0.0)
    (event,) = getattr(worker.scheduler, end)(sequence, 7, 1.0)
    assert event == Output("a", 0, (), finish=Finish(FinishReason.LENGTH))
    assert worker.scheduler.load() == Load(0, 0, 16, 16)


def test_there_is_no_reservation_without_room_and_nobody_is_preempted_for_one(
    worker, make_request
) -> None:
    (sequence,) = worker.submit(make_request("a", prompt=8, most=40))
    worker.step()
    worker.scheduler.reserve(make_request("b", prompt=48), worker.now)
    with pytest.raises(Overloaded):
        worker.scheduler.reserve(make_request("c", prompt=8), worker.now)
    assert sequence.preemptions == 0


@pytest.mark.parametrize("end", ["quiet", "arrived", "lost"])
def test_blocks_of_an_aborted_hand_off_stay_in_quarantine_until_the_transfer_is_quiet(
    worker, make_request, end
) -> None:
    sequence = worker.scheduler.reserve(make_request("a", prompt=9), 0.0)
    assert worker.scheduler.abort("a", 0.0)
    assert not worker.scheduler.abort("a", 0.0)
    worker.scheduler.check_integrity()
    assert worker.free == 13
    if end == "quiet":
        worker.scheduler.quiet(sequence)
    else:
        assert getattr(worker.scheduler, end)(sequence, 7, 0.0) == []
    worker.scheduler.quiet(sequence)
    worker.scheduler.check_integrity()
    assert worker.scheduler.load() == Load(0, 0, 16, 16)


def test_only_an_aborted_sequence_can_be_quiet(worker, make_request) -> None:
    sequence = worker.scheduler.reserve(make_request("a", prompt=9), 0.0)
    worker.scheduler.quiet(sequence)
    assert worker.free == 13
    worker.scheduler.check_integrity()
