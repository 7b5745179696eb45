"""The decode scheduler by example: passes, blocks, ranks, several sequences.

tests/scheduling/test_decode_properties.py has the rest.
"""

from __future__ import annotations

import dataclasses

import pytest

from baton.errors import AlreadyExists, InvalidRequest, Overloaded
from baton.types import Finish, FinishReason, Load, Output, PriorOutput
from engine.simulated import expected_tokens
from scheduling.cost import CostTracker, LinearCost
from scheduling.events import LocalPrefill, PromptLogprobs
from scheduling.mlfq import Mlfq
from scheduling.plan import Capacity
from scheduling.rules import Rules
from scheduling.sequence import Phase
from tests.scheduling.worker import TOKEN_OF, Worker


def test_a_prompt_is_computed_in_chunks_and_then_generates(worker, make_request) -> None:
    request = make_request("a", prompt=11, most=3)
    (sequence,) = worker.submit(request)
    shapes = []
    while sequence.phase is not Phase.FINISHED:
        shapes.append(worker.step()[0][("a", 0)])
    assert shapes == [8, 3, 1, 1]
    assert worker.tokens[("a", 0)] == expected_tokens(request, 0, TOKEN_OF)
    assert sequence.finish == Finish(FinishReason.LENGTH)
    assert worker.scheduler.plan(worker.now) is None
    assert worker.free == 16


def test_generation_comes_first_and_a_prompt_fills_the_rest_of_the_pass(
    worker, make_request
) -> None:
    worker.submit(make_request("a", prompt=2, most=9))
    worker.step()
    worker.submit(make_request("b", prompt=20))
    assert worker.step()[0] == {("a", 0): 1, ("b", 0): 7}


def test_a_stop_token_ends_a_sequence_and_is_reported(worker, make_request) -> None:
    third = expected_tokens(make_request("a", prompt=5, most=9), 0, TOKEN_OF)[2]
    worker.submit(make_request("a", prompt=5, most=9, eos=frozenset({third})))
    events = worker.finish()
    assert events[-1] == Output(
        "a", 0, (third,), finish=Finish(FinishReason.STOP, third, is_eos=True)
    )
    assert len(worker.tokens[("a", 0)]) == 3


def test_local_prefill_reports_its_times_and_prompt_logprobs_once(worker, make_request) -> None:
    worker.submit(make_request("a", prompt=8))
    worker.submit(make_request("b", prompt=12, prompt_logprobs=2))
    worker.step()
    events = worker.finish()
    assert [e for e in events if isinstance(e, LocalPrefill)] == [
        LocalPrefill("b", queued=1.0, computed=2.0)
    ]
    (logprobs,) = [e for e in events if isinstance(e, PromptLogprobs)]
    request = make_request("b", prompt=12)
    assert [p.token_id for p in logprobs.logprobs] == list(request.prompt_ids[1:])


def test_without_a_free_block_the_worst_ranked_is_recomputed_later(make_request) -> None:
    capacity = Capacity(blocks=6, block_size=2, max_tokens=32, max_sequences=8, max_context=12)
    worker = Worker(capacity)
    a, b = make_request("a", prompt=4, most=8), make_request("b", prompt=4, most=8)
    (first,), (second,) = worker.submit(a), worker.submit(b)
    worker.finish()
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert worker.tokens[("a", 0)] == expected_tokens(a, 0, TOKEN_OF)
    assert worker.tokens[("b", 0)] == expected_tokens(b, 0, TOKEN_OF)


def test_ahead_of_its_plan_a_sequence_has_the_block_for_the_token_after_the_newest(
    make_request,
) -> None:
    capacity = Capacity(blocks=6, block_size=2, max_tokens=32, max_sequences=8, max_context=12)
    worker = Worker(capacity, rules=Rules(ahead=True))
    (sequence,) = worker.submit(make_request("a", prompt=3, most=4))
    held = []
    while not sequence.finish:
        plan = worker.scheduler.plan(worker.now)
        held.append((len(sequence.tokens), len(sequence.blocks)))
        worker.take(worker.scheduler.apply(plan, worker.executor.execute(plan), worker.now))
    # With 4 tokens in 2 blocks it gets a third one; with 6 it does not: only one more can come.
    assert held == [(3, 2), (4, 3), (5, 3), (6, 3)]


def test_a_sequence_that_nobody_gives_a_block_to_leaves_its_token_to_a_prompt(
    make_request,
) -> None:
    capacity = Capacity(blocks=7, block_size=1, max_tokens=1, max_sequences=1, max_context=8)
    worker = Worker(capacity)
    stuck = worker.scheduler.reserve(make_request("stuck", prompt=1, most=2), 0.0)
    worker.scheduler.reserve(make_request("holds a block", prompt=1), 0.0)
    worker.submit(make_request("prompt", prompt=5, most=1, priority=1))
    worker.step()
    worker.scheduler.arrived(stuck, 1, worker.now)
    assert worker.free == 0
    for _ in range(4):
        assert worker.step()[0] == {("prompt", 0): 1}
    assert worker.step()[0] == {("stuck", 0): 1}


def test_a_prompt_gets_its_blocks_only_when_a_pass_has_tokens_for_it(worker, make_request) -> None:
    worker.submit(make_request("a", prompt=12))
    (waits,) = worker.submit(make_request("b", prompt=12))
    worker.step()
    assert waits.phase is Phase.WAITING
    worker.step()
    assert waits.phase is Phase.RUNNING


def test_nobody_gives_way_to_a_sequence_that_the_pass_has_no_token_for(make_request) -> None:
    capacity = Capacity(blocks=4, block_size=4, max_tokens=1, max_sequences=4, max_context=12)
    worker = Worker(capacity)
    sequences = [worker.scheduler.reserve(make_request(id, 4, 8), 0.0) for id in "abcd"]
    for sequence in sequences:
        worker.scheduler.arrived(sequence, 1, 0.0)
    worker.step()
    assert [s.preemptions for s in sequences] == [0, 0, 0, 1]


def test_nobody_overtakes_a_request_that_waits_for_blocks(worker, make_request) -> None:
    worker.submit(make_request("holds", prompt=8, most=20))
    worker.step()
    worker.submit(make_request("big", prompt=60))
    worker.submit(make_request("small", prompt=1))
    assert ("small", 0) not in worker.step()[0]
    with pytest.raises(Overloaded):
        worker.scheduler.reserve(make_request("reserved", prompt=1), worker.now)
    worker.scheduler.abort("big", worker.now)
    assert ("small", 0) in worker.step()[0]


def test_a_batch_has_no_more_sequences_than_it_may(worker, make_request) -> None:
    for index in range(6):
        worker.submit(make_request(f"r{index}", prompt=1, most=3))
    assert set(worker.step()[0]) == {(f"r{index}", 0) for index in range(4)}


def test_mlfq_lets_a_new_request_displace_one_that_has_sunk(make_request) -> None:
    capacity = Capacity(blocks=16, block_size=4, max_tokens=8, max_sequences=1, max_context=64)
    worker = Worker(
        capacity,
        "skip-join-mlfq",
        mlfq=Mlfq(levels=3, quantum=2.0, promote_after=100.0),
        cost=CostTracker(LinearCost(1.0, 0.0), every=0),
    )
    (old,) = worker.submit(make_request("old", prompt=4, most=20))
    worker.step()
    worker.submit(make_request("new", prompt=4, most=2))
    assert set(worker.step()[0]) == {("old", 0)}
    assert old.level == 1
    assert set(worker.step()[0]) == {("new", 0)}
    assert old.blocks
    assert old.phase is Phase.RUNNING
    assert set(worker.step()[0]) == {("new", 0)}
    assert set(worker.step()[0]) == {("old", 0)}


def test_mlfq_promotes_what_has_waited_too_long(make_request) -> None:
    capacity = Capacity(blocks=64, block_size=4, max_tokens=8, max_sequences=1, max_context=64)
    worker = Worker(
        capacity,
        "skip-join-mlfq",
        mlfq=Mlfq(levels=2, quantum=2.0, promote_after=5.0),
        cost=CostTracker(LinearCost(1.0, 0.0), every=0),
    )
    worker.submit(make_request("an old one", prompt=4, most=30))
    ran = []
    for step in range(12):
        worker.submit(make_request(f"new{step}", prompt=4, most=2))
        ran.append("old" if ("an old one", 0) in worker.step()[0] else "new")
    assert ran == ["old"] * 2 + ["new"] * 5 + ["old"] * 2 + ["new"] * 3


# -- Requests that cannot be taken ---------------------------------------------------------


def test_a_request_that_can_never_fit_is_refused_at_once(worker, make_request) -> None:
    for take in (worker.scheduler.submit, worker.scheduler.reserve):
        with pytest.raises(InvalidRequest):
            take(make_request("a", prompt=60, most=5), 0.0)
    worker.submit(make_request("a", prompt=60, most=4))
    worker.finish()


def test_the_waiting_room_is_bounded_and_ids_are_unique(capacity, make_request) -> None:
    worker = Worker(capacity, max_waiting=2)
    worker.submit(make_request("a", prompt=1))
    with pytest.raises(AlreadyExists):
        worker.submit(make_request("a", prompt=1))
    worker.submit(make_request("b", prompt=1))
    with pytest.raises(Overloaded):
        worker.submit(make_request("c", prompt=1))


# -- More than one sequence ----------------------------------------------------------------


def test_forks_share_the_full_blocks_of_the_prompt(make_request) -> None:
    capacity = Capacity(blocks=20, block_size=4, max_tokens=64, max_sequences=8, max_context=64)
    worker = Worker(capacity)
    request = make_request("a", prompt=10, most=3, n=3)
    first, second, third = worker.submit(request)
    assert worker.step()[0] == {("a", 0): 10}
    assert second.blocks[:2] == third.blocks[:2] == first.blocks[:2]
    assert worker.free == 20 - (3 + 1 + 1)
    assert worker.step()[0] == {("a", 0): 1, ("a", 1): 2, ("a", 2): 2}
    worker.finish()
    for index in range(3):
        assert worker.tokens[("a", index)] == expected_tokens(request, index, TOKEN_OF)
    assert worker.free == 20


def test_forks_share_the_prompt_even_if_their_elder_ends_with_its_first_token(
    make_request,
) -> None:
    capacity = Capacity(blocks=20, block_size=4, max_tokens=64, max_sequences=8, max_context=64)
    worker = Worker(capacity)
    worker.submit(make_request("a", prompt=12, most=1, n=4))
    assert worker.step()[0] == {("a", 0): 12}
    assert worker.step()[0] == {("a", 1): 4, ("a", 2): 4, ("a", 3): 4}
    assert worker.scheduler.load() == Load(0, 0, 20, 20)


def test_a_prompt_within_one_block_has_nothing_to_share(worker, make_request) -> None:
    worker.submit(make_request("a", prompt=4, most=2, n=2))
    assert worker.step()[0] == {("a", 0): 4, ("a", 1): 4}


def test_a_second_attempt_goes_on_where_the_first_one_stopped(worker, make_request) -> None:
    whole = make_request("a", prompt=6, most=5, n=3)
    done = [expected_tokens(whole, index, TOKEN_OF) for index in range(3)]
    prior = (PriorOutput(tuple(done[0]), finished=True), PriorOutput(tuple(done[1][:2])))
    again = dataclasses.replace(whole, prior_outputs=(*prior, PriorOutput()))
    assert [s.index for s in worker.submit(again)] == [1, 2]
    worker.finish()
    assert worker.tokens == {("a", 1): done[1][2:], ("a", 2): done[2]}


def test_nothing_is_left_of_a_request_whose_sequences_had_all_ended(worker, make_request) -> None:
    request = make_request("a", prompt=6, prior_outputs=(PriorOutput((1,), finished=True),))
    assert worker.submit(request) == []
    assert worker.scheduler.plan(0.0) is None
    assert not worker.scheduler.abort("a", 0.0)
