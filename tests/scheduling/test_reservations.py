"""What is reserved, who is let in, and what becomes of a sequence that outlives its allotment."""

from __future__ import annotations

import dataclasses

import pytest

from baton.types import LengthEstimate
from scheduling.decode import DecodeScheduler
from scheduling.order import make_policy
from scheduling.plan import Capacity, Sampled, StepResult
from scheduling.rules import Rules
from scheduling.sequence import Phase

CAPACITY = Capacity(blocks=16, block_size=4, max_tokens=64, max_sequences=8, max_context=64)


class Worker:
    """A scheduler whose passes all sample token 1."""

    def __init__(self, admission: str, capacity: Capacity = CAPACITY) -> None:
        rules = Rules(admission=admission)
        self.scheduler = DecodeScheduler(capacity, make_policy("fcfs"), max_waiting=99, rules=rules)
        self.now = 0.0

    def submit(self, request):
        (sequence,) = self.scheduler.submit(request, self.now)
        return sequence

    def step(self) -> set[str]:
        """One pass; the requests in it."""
        plan = self.scheduler.plan(self.now)
        self.scheduler.check_integrity()
        self.now += 1.0
        sampled = tuple(Sampled(1) if chunk.sample else None for chunk in plan.chunks)
        result = StepResult(sampled, ((),) * len(plan.chunks), 1.0)
        self.scheduler.apply(plan, result, self.now)
        self.scheduler.check_integrity()
        return {chunk.sequence.request.id for chunk in plan.chunks}


def estimated(make_request, id: str, prompt: int, most: int, allotment: int):
    return make_request(id, prompt, most, estimate=LengthEstimate(allotment, allotment))


def test_reserve_max_lets_in_as_many_as_can_grow_to_their_ends(make_request) -> None:
    worker = Worker("reserve-max")
    for id in "abc":
        worker.submit(make_request(id, prompt=4, most=25))  # seven blocks each
    assert worker.step() == {"a", "b"}
    while worker.scheduler.load().running:
        worker.step()
    assert worker.scheduler.counters.recomputed == 0


def test_paged_lets_in_whoever_fits_now(make_request) -> None:
    worker = Worker("paged")
    for id in "abc":
        worker.submit(make_request(id, prompt=4, most=25))
    assert worker.step() == {"a", "b", "c"}


def test_reserve_sum_adds_up_the_allotments(make_request) -> None:
    worker = Worker("reserve-sum")
    for id in "abcd":
        worker.submit(estimated(make_request, id, prompt=4, most=60, allotment=17))  # 5 blocks
    assert worker.step() == {"a", "b", "c"}


def test_reserve_predicted_counts_on_those_that_end_before_the_others_have_grown(
    make_request,
) -> None:
    requests = [
        estimated(make_request, "1 short", prompt=20, most=44, allotment=4),
        estimated(make_request, "2 long", prompt=4, most=60, allotment=40),
    ]
    for admission, together in (
        ("reserve-sum", {"1 short"}),
        ("reserve-predicted", {"1 short", "2 long"}),
    ):
        worker = Worker(admission)
        for request in requests:
            worker.submit(request)
        assert worker.step() == together


def test_reserve_predicted_keeps_out_who_would_not_fit_at_the_peak(make_request) -> None:
    worker = Worker("reserve-predicted")
    for id in "abc":
        worker.submit(estimated(make_request, id, prompt=4, most=30, allotment=24))
    assert worker.step() == {"a", "b"}


def test_without_an_estimate_nothing_is_reserved(make_request) -> None:
    worker = Worker("reserve-predicted")
    sequences = [worker.submit(make_request(id, prompt=4, most=25)) for id in "abc"]
    assert worker.step() == {"a", "b", "c"}
    assert [s.allotment for s in sequences] == [0, 0, 0]


def test_an_allotment_is_no_longer_than_the_output_may_be(make_request) -> None:
    worker = Worker("reserve-predicted")
    sequence = worker.submit(estimated(make_request, "a", prompt=4, most=7, allotment=50))
    assert sequence.allotment == 7


def test_an_outgrown_allotment_is_doubled_and_counted_once(make_request) -> None:
    worker = Worker("reserve-predicted")
    sequence = worker.submit(estimated(make_request, "a", prompt=4, most=30, allotment=3))
    seen = []
    while sequence.phase is not Phase.FINISHED:
        worker.step()
        seen.append(sequence.allotment)
    assert sorted(set(seen)) == [3, 6, 12, 24, 30]
    assert worker.scheduler.counters.mispredictions == 1


def test_a_doubled_allotment_gets_as_much_as_nobody_counts_on(make_request) -> None:
    worker = Worker("reserve-sum")
    first = worker.submit(estimated(make_request, "a", prompt=4, most=40, allotment=13))
    second = worker.submit(estimated(make_request, "b", prompt=4, most=44, allotment=41))
    while first.generated < 13:
        worker.step()
    assert (first.allotment, second.allotment) == (13, 41)
    worker.step()  # 4 blocks and 11 are reserved of 16
    assert first.allotment == 17


def test_who_outlives_its_allotment_waits_if_only_better_ones_are_left(make_request) -> None:
    worker = Worker("reserve-sum")
    worker.submit(estimated(make_request, "a", prompt=4, most=45, allotment=45))
    late = worker.submit(estimated(make_request, "b", prompt=4, most=40, allotment=13))
    while late.generated < 13:
        assert worker.step() == {"a", "b"}
    assert worker.step() == {"a"}
    assert late.phase is Phase.RUNNING
    while worker.scheduler.load().running:
        worker.step()
    assert worker.scheduler.counters.recomputed == 0


def test_what_outgrew_its_allotment_comes_back_with_another(make_request) -> None:
    prior = make_request("x", 1).prior(0)
    request = estimated(make_request, "a", prompt=4, most=40, allotment=5)
    again = dataclasses.replace(
        request, prior_outputs=(dataclasses.replace(prior, token_ids=(1,) * 12),)
    )
    worker = Worker("reserve-sum")
    assert worker.submit(again).allotment == 20


@pytest.mark.parametrize("admission", ["reserve-max", "reserve-sum", "reserve-predicted"])
def test_a_request_that_fills_the_worker_is_let_in_alone(make_request, admission) -> None:
    worker = Worker(admission)
    worker.submit(estimated(make_request, "a", prompt=60, most=4, allotment=4))
    worker.submit(estimated(make_request, "b", prompt=1, most=60, allotment=60))
    assert worker.step() == {"a"}
    for _ in range(3):
        worker.step()
    assert worker.step() == {"b"}


def test_kv_from_elsewhere_needs_room_for_its_reservation_too(make_request) -> None:
    worker = Worker("reserve-sum")
    worker.submit(estimated(make_request, "a", prompt=4, most=50, allotment=41))
    worker.step()
    room = worker.scheduler._kv.blocks.free - worker.scheduler._kv.reservations.total
    assert room == 16 - 11
    fits = estimated(make_request, "b", prompt=8, most=20, allotment=13)
    too_long = estimated(make_request, "c", prompt=8, most=20, allotment=14)
    with pytest.raises(Exception, match="no room"):
        worker.scheduler.reserve(too_long, worker.now)
    worker.scheduler.reserve(fits, worker.now)
    worker.scheduler.check_integrity()
