"""KV of a prefix is computed once, and used only by those who may.

Tokens come from the KV itself (engine/simulated.py), so a wrong block gives a wrong token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from baton.prefix import block_keys
from baton.types import LengthEstimate, PriorOutput, Request, Sampling, Stopping
from engine.simulated import expected_tokens
from scheduling.events import LocalPrefill
from scheduling.mlfq import Mlfq
from scheduling.plan import Capacity
from scheduling.prefix import PrefixCounters
from scheduling.rules import Rules
from scheduling.sequence import Phase
from tests.scheduling.worker import TOKEN_OF, Worker, deliver

CAPACITY = Capacity(blocks=40, block_size=4, max_tokens=64, max_sequences=8, max_context=128)


def caching(capacity: Capacity = CAPACITY, **options: Any) -> Worker:
    return Worker(capacity, block_keys=block_keys, **options)


def request(id: str, prompt: int = 18, most: int = 4, n: int = 1, **fields: Any) -> Request:
    """All prompts begin alike."""
    ids = fields.pop("prompt_ids", tuple(range(10, 10 + prompt)))
    return Request(id, ids, Sampling(n=n), Stopping(most), **fields)


def right(worker: Worker, *requests: Request) -> None:
    """Each got what it would have got by itself."""
    for one in requests:
        for index in range(one.sampling.n):
            assert worker.tokens[one.id, index] == expected_tokens(one, index, TOKEN_OF)


def computed(worker: Worker, one: Request) -> int:
    """Serve a request alone: how many tokens of it the first pass computed."""
    worker.submit(one)
    shape, _ = worker.step()
    worker.finish()
    right(worker, one)
    return shape[one.id, 0]


def test_a_second_prompt_that_begins_alike_has_only_the_rest_computed() -> None:
    worker = caching()
    assert computed(worker, request("a", 18)) == 18
    assert computed(worker, request("b", 25)) == 25 - 16
    assert computed(worker, request("c", 6)) == 2
    assert worker.free == CAPACITY.blocks
    assert worker.scheduler.prefixes == PrefixCounters(18 + 25 + 6, 16 + 4)


def test_without_keys_nothing_is_found() -> None:
    worker = Worker(CAPACITY)
    assert [computed(worker, request(name)) for name in "ab"] == [18, 18]
    assert worker.scheduler.prefixes == PrefixCounters()


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    worker = caching()
    assert [computed(worker, request(name, 16)) for name in "ab"] == [16, 4]
    assert [computed(worker, request(name, 17)) for name in "cd"] == [1, 1]


def test_the_next_turn_finds_the_prompt_and_the_answer_of_the_last_one() -> None:
    worker = caching()
    first = request("a", 10, most=12)
    assert computed(worker, first) == 10
    said = (*first.prompt_ids, *worker.tokens["a", 0])
    # The last token of an answer is never computed: 21 are known, which is five blocks.
    assert computed(worker, request("b", prompt_ids=(*said, 7, 8, 9))) == 25 - 20


def test_sequences_share_what_another_one_still_uses() -> None:
    worker = caching()
    long = request("a", 24, most=20)
    worker.submit(long)
    worker.step()
    used = CAPACITY.blocks - worker.free
    other = request("b", 24)
    (sequence,) = worker.submit(other)
    assert worker.step()[0] == {("a", 0): 1, ("b", 0): 24 - 20}
    assert CAPACITY.blocks - worker.free - used <= 3
    assert sequence.phase is Phase.RUNNING
    worker.finish()
    right(worker, long, other)


@pytest.mark.parametrize(
    "fields", [{"tenant": "else"}, {"cache_salt": "else"}, {"bypass_cache": True}]
)
def test_others_neither_find_it_nor_leave_what_is_found(fields: dict[str, Any]) -> None:
    worker = caching()
    mine, theirs = request("a"), request("b", **fields)
    assert [computed(worker, one) for one in (theirs, mine)] == [18, 18]
    again = computed(worker, replace(theirs, id="c"))
    assert again == (18 if theirs.bypass_cache else 2)


def test_a_prompt_whose_logprobs_are_wanted_is_computed_from_its_beginning() -> None:
    worker = caching()
    assert computed(worker, request("a")) == 18
    asks = request("b", prompt_logprobs=0)
    worker.submit(asks)
    shape, events = worker.step()
    assert shape == {("b", 0): 18}
    assert any(len(getattr(event, "logprobs", ())) == 17 for event in events)
    worker.finish()
    assert computed(worker, request("c")) == 2


def test_what_was_found_is_told_with_the_prompts_times() -> None:
    worker = caching()
    told = []
    for name in "ab":
        worker.submit(request(name))
        told += [event for event in worker.finish() if isinstance(event, LocalPrefill)]
    assert [event.cached for event in told] == [0, 16]


def test_output_of_an_earlier_attempt_is_found_and_not_counted_as_prompt() -> None:
    worker = caching()
    first = request("a", 10, most=12)
    computed(worker, first)
    prior = tuple(worker.tokens["a", 0][:8])
    worker.submit(request("b", 10, most=12, prior_outputs=(PriorOutput(prior),)))
    shape, events = worker.step()
    assert shape == {("b", 0): 2}
    assert [event.cached for event in events if isinstance(event, LocalPrefill)] == [10]
    worker.finish()
    assert [*prior, *worker.tokens["b", 0]] == expected_tokens(first, 0, TOKEN_OF)


def test_a_preempted_sequence_finds_its_own_blocks_when_nobody_took_them() -> None:
    # Both grow to 12 blocks at the end; 18 blocks do.
    worker = caching(replace(CAPACITY, blocks=18))
    both = [request(name, 24, most=24, tenant=name) for name in "ab"]
    (_,), (second,) = (worker.submit(one) for one in both)
    while not second.preemptions:
        worker.step()
    shape: dict[tuple[str, int], int] = {}
    while ("b", 0) not in shape:
        shape, _ = worker.step()
    assert shape["b", 0] < len(second.tokens) - 1
    worker.finish()
    right(worker, *both)


def test_a_sequence_that_was_swapped_is_found_again() -> None:
    worker = caching(replace(CAPACITY, blocks=14, host_blocks=20), rules=Rules(preemption="swap"))
    both = [request(name, 20, most=20, tenant=name) for name in "ab"]
    for one in both:
        worker.submit(one)
    worker.finish()
    assert worker.scheduler.counters.swapped_in > 0
    right(worker, *both)
    # The one that was swapped ended last, in other blocks than it had begun in.
    assert computed(worker, replace(both[1], id="c")) == 4


@pytest.mark.parametrize("swapping", ["proactive", "reactive"])
def test_a_sequence_that_comes_back_shares_what_is_still_on_the_device(swapping: str) -> None:
    worker = caching(
        replace(CAPACITY, blocks=15, host_blocks=20),
        rules=Rules(preemption="swap", swapping=swapping, swap_reserve=0.0),
    )
    many = [request(name, 20, most=16) for name in "abc"]
    worker.submit(many[0])
    worker.step()
    for one in many[1:]:
        worker.submit(one)
    worker.finish()
    right(worker, *many)
    counters = worker.scheduler.counters
    assert counters.swapped_in > 0
    # The prompt, whose KV the others have, has gone out with the rest and is not brought back.
    assert counters.blocks_in <= counters.blocks_out - 4 * counters.swapped_in
    assert worker.scheduler._kv.swaps.host.free == 20


def test_siblings_share_with_those_who_came_before_and_with_each_other() -> None:
    worker = caching()
    one = request("a", 18, n=3)
    worker.submit(one)
    worker.finish()
    right(worker, one)
    again = request("b", 18, n=3)
    worker.submit(again)
    shape, _ = worker.step()
    assert shape == {("b", 0): 2, ("b", 1): 2, ("b", 2): 2}
    worker.finish()
    right(worker, again)
    private = request("c", 18, n=2, bypass_cache=True)
    worker.submit(private)
    assert worker.step()[0] == {("c", 0): 18}
    assert worker.step()[0] == {("c", 0): 1, ("c", 1): 2}
    worker.finish()
    right(worker, private)


def test_room_for_a_transfer_is_taken_for_what_is_not_here_only() -> None:
    worker = caching()
    first = request("a", 18)
    computed(worker, first)
    second = request("b", 26, most=6)
    sequence = worker.scheduler.reserve(second, worker.now)
    assert (sequence.cached, len(sequence.blocks)) == (16, 7)
    assert worker.free == CAPACITY.blocks - 7
    token = deliver(worker, sequence)
    worker.tokens["b", 0] = [token]
    worker.take(worker.scheduler.arrived(sequence, token, worker.now))
    worker.finish()
    right(worker, second)
    # What was transferred is found, too.
    assert computed(worker, request("c", 26)) == 2


def test_what_was_lost_on_its_way_is_computed_from_what_is_here() -> None:
    worker = caching()
    computed(worker, request("a", 18))
    one = request("b", 26, most=6)
    sequence = worker.scheduler.reserve(one, worker.now)
    first = expected_tokens(one, 0, TOKEN_OF)[0]
    worker.tokens["b", 0] = [first]
    worker.take(worker.scheduler.lost(sequence, first, worker.now))
    assert worker.step()[0] == {("b", 0): 27 - 16}
    worker.finish()
    right(worker, one)


def test_a_reservation_that_is_given_up_leaves_what_it_shared() -> None:
    worker = caching()
    computed(worker, request("a", 18))
    sequence = worker.scheduler.reserve(request("b", 26), worker.now)
    worker.scheduler.abort("b", worker.now)
    worker.scheduler.quiet(sequence)
    worker.scheduler.check_integrity()
    assert worker.free == CAPACITY.blocks
    assert computed(worker, request("c", 26)) == 26 - 16


def test_a_known_prompt_joins_the_level_of_what_is_left_of_it() -> None:
    mlfq = Mlfq(quantum=0.025, ratio=2.0)
    worker = caching(policy="skip-join-mlfq", mlfq=mlfq)
    (unknown,) = worker.submit(request("a", 120))
    worker.finish()
    (known,) = worker.submit(request("b", 120))
    assert known.level < unknown.level
    worker.finish()


def test_cached_blocks_are_given_up_when_others_need_them() -> None:
    worker = caching(replace(CAPACITY, blocks=8))
    old = request("a", 18, tenant="a")
    assert computed(worker, old) == 18
    assert computed(worker, request("b", 30, most=2, tenant="b")) == 30
    assert computed(worker, replace(old, id="c")) == 18


def test_a_forecast_counts_a_shared_prefix_once() -> None:
    # 20 blocks of prompt in each, 40 in all: apart there is room for one of them and a half.
    worker = caching(replace(CAPACITY, max_tokens=128), rules=Rules(admission="reserve-predicted"))
    estimate = LengthEstimate(8, 40)
    worker.submit(request("a", 81, most=40, estimate=estimate))
    worker.step()
    for name in "bcde":
        worker.submit(request(name, 81, most=40, estimate=estimate))
    assert set(worker.step()[0]) == {(name, 0) for name in "abcde"}
