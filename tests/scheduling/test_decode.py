"""The decode scheduler by example; tests/scheduling/test_decode_properties.py has the rest."""

from __future__ import annotations

import dataclasses

import pytest

from baton.errors import AlreadyExists, InvalidRequest, Overloaded
from baton.types import Finish, FinishReason, Load, Output, PriorOutput
from engine.simulated import CostModelExecutor, checksum_token, expected_tokens
from scheduling.cost import CostTracker, LinearCost
from scheduling.decode import DecodeScheduler
from scheduling.events import LocalPrefill, PromptLogprobs, RequestFailed
from scheduling.mlfq import Mlfq
from scheduling.order import make_policy
from scheduling.plan import Capacity
from scheduling.sequence import Phase

TOKEN_OF = checksum_token(1000)


class Worker:
    """A scheduler with an executor, stepped by hand on a clock of its own."""

    def __init__(self, capacity: Capacity, policy="fcfs", max_waiting=100, **options) -> None:
        self.scheduler = DecodeScheduler(
            capacity, make_policy(policy, **options), max_waiting=max_waiting
        )
        self.executor = CostModelExecutor(capacity, LinearCost(1.0, 0.0, 0.0), TOKEN_OF)
        self.now = 0.0
        self.tokens: dict[tuple[str, int], list[int]] = {}

    def submit(self, request):
        return self.scheduler.submit(request, self.now)

    def step(self):
        """One pass: (request id, index) -> tokens in it, and the events."""
        plan = self.scheduler.plan(self.now)
        assert plan is not None
        shape = {chunk.sequence.id: chunk.length for chunk in plan.chunks}
        result = self.executor.execute(plan)
        self.now += result.seconds
        return shape, self.take(self.scheduler.apply(plan, result, self.now))

    def take(self, events):
        self.scheduler.check_integrity()
        for event in events:
            if isinstance(event, Output):
                self.tokens.setdefault((event.request_id, event.index), []).extend(event.token_ids)
        return events

    def finish(self):
        """Run until nothing is left; the events of all passes."""
        events = []
        while self.scheduler.load().running + self.scheduler.load().waiting:
            events += self.step()[1]
        return events

    @property
    def free(self) -> int:
        return self.scheduler.load().free_blocks


@pytest.fixture
def worker(capacity) -> Worker:
    return Worker(capacity)


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


# -- The hand-off --------------------------------------------------------------------------


def deliver(worker, sequence) -> int:
    """Write the KV of all tokens, as a transfer does; the token sampled after them."""
    size = worker.executor.capacity.block_size
    for position, token in enumerate(sequence.tokens):
        block = worker.executor.store.block(sequence.blocks[position // size]).cast("i")
        block[position % size] = token
    return expected_tokens(sequence.request, sequence.index, TOKEN_OF)[0]


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


# -- While a pass runs ---------------------------------------------------------------------


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
