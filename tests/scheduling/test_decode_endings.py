"""Requests and sequences that are aborted or fail, while a pass runs and between passes."""

from __future__ import annotations

import pytest

from engine.simulated import expected_tokens
from scheduling.events import RequestFailed
from scheduling.sequence import Phase
from tests.scheduling.worker import TOKEN_OF, deliver


def test_a_request_aborted_during_a_pass_leaves_no_trace_in_its_events(
    worker, make_request
) -> None:
    worker.submit(make_request("a", prompt=3))
    (sequence,) = worker.submit(make_request("b", prompt=3))
    plan = worker.scheduler.plan(0.0)
    blocks = list(sequence.blocks)
    assert worker.scheduler.abort("b", 0.0)
    assert sequence.blocks == blocks, "the pass reads the sequence"
    taken = worker.scheduler.reserve(make_request("c", prompt=40), 0.0)
    assert not set(taken.blocks) & set(blocks), "the pass writes to these blocks"
    events = worker.scheduler.apply(plan, worker.executor.execute(plan), 1.0)
    assert {event.request_id for event in events} == {"a"}
    assert sequence.phase is Phase.FINISHED
    worker.scheduler.check_integrity()


def test_an_id_can_be_used_again_while_the_pass_of_its_aborted_namesake_runs(
    worker, make_request
) -> None:
    worker.submit(make_request("a", prompt=3))
    plan = worker.scheduler.plan(0.0)
    worker.scheduler.abort("a", 0.0)
    request = make_request("a", prompt=5)
    worker.submit(request)
    assert worker.scheduler.apply(plan, worker.executor.execute(plan), 1.0) == []
    worker.finish()
    assert worker.tokens[("a", 0)] == expected_tokens(request, 0, TOKEN_OF)


def test_one_sequence_can_be_aborted_while_its_siblings_go_on(worker, make_request) -> None:
    request = make_request("a", prompt=9, most=6, n=3)
    worker.submit(request)
    while ("a", 2) not in worker.tokens:
        worker.step()
    plan = worker.scheduler.plan(worker.now)
    assert {chunk.sequence.index for chunk in plan.chunks} == {0, 1, 2}
    assert worker.scheduler.abort_sequence("a", 1)
    assert not worker.scheduler.abort_sequence("a", 1)
    events = worker.scheduler.apply(plan, worker.executor.execute(plan), 1.0)
    assert {event.index for event in events} == {0, 2}
    worker.scheduler.check_integrity()
    worker.tokens.clear()
    worker.finish()
    assert set(worker.tokens) == {("a", 0), ("a", 2)}
    assert worker.free == 16


def test_a_request_ends_with_the_last_sequence_that_is_aborted(worker, make_request) -> None:
    worker.submit(make_request("a", prompt=9, n=2))
    worker.step()
    assert worker.scheduler.abort_sequence("a", 0)
    assert worker.scheduler.abort_sequence("a", 1)
    assert not worker.scheduler.abort("a", 0.0)
    assert worker.scheduler.plan(worker.now) is None
    assert worker.free == 16


def test_siblings_compute_the_prompt_when_the_one_that_did_is_aborted(worker, make_request) -> None:
    request = make_request("a", prompt=30, most=3, n=2)
    first, _ = worker.submit(request)
    worker.step()
    assert 0 < first.computed < 30
    assert worker.scheduler.abort_sequence("a", 0)
    worker.finish()
    assert worker.tokens == {("a", 1): expected_tokens(request, 1, TOKEN_OF)}


def test_a_sequence_whose_kv_is_on_its_way_is_not_aborted_alone(worker, make_request) -> None:
    sequence = worker.scheduler.reserve(make_request("a", prompt=9, n=2), 0.0)
    assert not worker.scheduler.abort_sequence("a", 0)
    assert worker.scheduler.abort_sequence("a", 1)
    assert not worker.scheduler.abort_sequence("nobody", 0)
    worker.scheduler.arrived(sequence, deliver(worker, sequence), 0.0)
    assert worker.scheduler.abort_sequence("a", 0)
    assert worker.free == 16


def test_a_broken_pass_fails_the_requests_in_it_and_no_others(worker, make_request) -> None:
    worker.submit(make_request("a", prompt=8, n=2))
    worker.submit(make_request("b", prompt=8))
    plan = worker.scheduler.plan(0.0)
    assert worker.scheduler.fail(plan, 1.0) == [RequestFailed("a")]
    worker.scheduler.check_integrity()
    worker.finish()
    assert set(worker.tokens) == {("b", 0)}
    assert worker.free == 16


def test_a_plan_must_be_applied_before_the_next_and_only_once(worker, make_request) -> None:
    worker.submit(make_request("a", prompt=3))
    plan = worker.scheduler.plan(0.0)
    with pytest.raises(RuntimeError, match="not applied"):
        worker.scheduler.plan(0.0)
    result = worker.executor.execute(plan)
    worker.scheduler.apply(plan, result, 1.0)
    with pytest.raises(RuntimeError, match="does not run"):
        worker.scheduler.apply(plan, result, 1.0)
