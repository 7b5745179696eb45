"""A request crosses from prefill to decode and comes out with exactly the tokens it must have."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from google.rpc import code_pb2

from baton.types import FinishReason, PriorOutput, Request
from queueing.contract import Verdict
from tests.decode_worker.conftest import Pair, expected, request


async def served_without_the_kv(pair: Pair, slot: int, one: Request) -> None:
    """It gets all its tokens, though what was handed over is not used."""
    heard = await pair.finished(slot)
    assert heard.tokens[0] == expected(one)
    arrived = heard.event("kv_arrived")
    assert arrived is not None
    assert arrived.kv_arrived.recomputed
    await pair.all_free()


@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 16, 17, 60])
async def test_tokens_after_a_hand_off_are_those_of_one_engine(pair: Pair, prompt: int) -> None:
    one = request("a", prompt, new=9)
    pair.start(1, one)
    await pair.hand_off(1, one)
    heard = await pair.finished(1)
    assert heard.tokens[0] == expected(one)
    assert heard.finished[0] is FinishReason.LENGTH
    arrived = heard.event("kv_arrived")
    assert arrived is not None
    assert not arrived.kv_arrived.recomputed
    assert arrived.kv_arrived.bytes == -(-prompt // 4) * 16
    await pair.all_free()


async def test_the_next_turn_brings_only_what_is_new(pair: Pair) -> None:
    first = request("a", 18, new=9)
    pair.start(1, first)
    await pair.hand_off(1, first)
    said = (*first.prompt_ids, *(await pair.finished(1)).tokens[0])
    await pair.all_free()
    second = replace(first, id="b", prompt_ids=(*said, 5, 6, 7))
    pair.start(2, second)
    await pair.hand_off(2, second)
    heard = await pair.finished(2)
    assert heard.tokens[0] == expected(second)
    arrived = heard.event("kv_arrived")
    assert arrived is not None
    # Of 30 tokens in eight blocks, 26 were here: the last one of an answer is never computed.
    assert arrived.kv_arrived.bytes == (8 - 6) * 16
    assert pair.prefilled[2].cached == 16  # what the prefill worker knows ends with the prompt
    assert pair.metric("prefill_prefix_hit_tokens_total") == 16
    assert pair.metric("decode_prefix_hit_tokens_total") == 24
    assert pair.metric("decode_prefix_lookup_tokens_total") == 18 + 30
    await pair.all_free()


async def test_a_prompt_that_is_here_costs_one_block(pair: Pair) -> None:
    many = {slot: request("same", 20, new=4 + slot) for slot in (1, 2, 3)}
    for slot, one in many.items():
        pair.start(slot, one)
        await pair.hand_off(slot, one)
        assert (await pair.finished(slot)).tokens[0] == expected(one)
    moved = [pair.heard[slot].event("kv_arrived") for slot in many]
    assert [event.kv_arrived.bytes // 16 for event in moved if event] == [5, 1, 1]


async def test_a_corrupt_rest_is_recomputed_from_what_is_here(pair: Pair) -> None:
    first = request("a", 18, new=4)
    pair.start(1, first)
    await pair.hand_off(1, first)
    await pair.finished(1)
    pair.network.faults.flip_bit_of = {5}
    second = replace(first, id="b", prompt_ids=(*first.prompt_ids, *range(10)))
    pair.start(2, second)
    await pair.hand_off(2, second)
    await served_without_the_kv(pair, 2, second)


async def test_many_at_once_share_nothing(pair: Pair) -> None:
    many = {slot: request(f"r{slot}", 3 + 5 * slot % 23, new=4 + slot) for slot in range(1, 9)}
    for slot, one in many.items():
        pair.start(slot, one)
    await asyncio.gather(*(pair.hand_off(slot, one) for slot, one in many.items()))
    for slot, one in many.items():
        heard = await pair.finished(slot)
        assert heard.tokens[0] == expected(one), slot
    await pair.all_free()


async def test_siblings_fork_from_the_handed_over_prompt(pair: Pair) -> None:
    one = request("n", 13, new=6, n=3, seed=7)
    pair.start(1, one)
    await pair.hand_off(1, one)
    heard = await pair.finished(1, sequences=3)
    assert heard.tokens == {index: expected(one, index) for index in range(3)}
    assert len({tuple(tokens) for tokens in heard.tokens.values()}) == 3
    await pair.all_free()


async def test_an_earlier_attempt_is_continued_not_repeated(pair: Pair) -> None:
    one = request("again", 10, new=12)
    whole = expected(one)
    resumed = replace(one, prior_outputs=(PriorOutput(tuple(whole[:5])),))
    pair.start(1, resumed)
    await pair.hand_off(1, resumed)
    heard = await pair.finished(1)
    assert heard.tokens[0] == whole[5:]


async def test_a_corrupt_hand_off_is_recomputed_and_never_served(pair: Pair) -> None:
    pair.network.faults.flip_bit_of = {1}
    one = request("bad", 21, new=5)
    pair.start(1, one)
    await pair.hand_off(1, one)
    await served_without_the_kv(pair, 1, one)


async def test_a_dead_producer_costs_a_recomputation(pair: Pair) -> None:
    pair.network.faults.die_before = 2
    one = request("dead", 21, new=5)
    pair.start(1, one)
    await pair.hand_off(1, one)
    assert (await pair.finished(1)).tokens[0] == expected(one)


async def test_local_prefill_needs_no_other_worker(pair: Pair) -> None:
    one = request("local", 19, new=7, n=2)
    pair.start(1, one, local=True)
    heard = await pair.finished(1, sequences=2)
    assert heard.tokens == {0: expected(one, 0), 1: expected(one, 1)}
    assert heard.event("local_prefill") is not None
    await pair.all_free()


async def test_one_message_carries_a_whole_step(pair: Pair) -> None:
    many = {slot: request(f"s{slot}", 4, new=20) for slot in range(1, 5)}
    for slot, one in many.items():
        pair.start(slot, one, local=True)
    for slot in many:
        await pair.finished(slot)
    # 80 tokens; the four run together, so there are about as many messages as steps.
    assert sum(heard.messages for heard in pair.heard.values()) == 80
    assert pair.decode.engine.steps <= 24


async def test_an_aborted_pull_leaves_no_block_and_no_lease_behind(pair: Pair) -> None:
    pair.network.faults.delay = 0.2
    pair.network.faults.late = 0.2
    one = request("gone", 40, new=5)
    pair.start(1, one)
    await pair.hand_off(1, one)
    pair.decode.abort(pair.link, [1])
    assert pair.decode.idle
    await pair.all_free()
    assert pair.producer.leased_blocks == 0
    assert not pair.heard[1].finished


async def test_a_cancelled_prefill_frees_its_blocks_and_lease() -> None:
    async with Pair(step_seconds=0.05) as pair:
        one = request("cancelled", 200, new=5)
        pair.start(1, one)
        prefill = asyncio.create_task(pair.hand_off(1, one))
        await pair.until(lambda: pair.producer.leased_blocks)
        prefill.cancel()
        await asyncio.gather(prefill, return_exceptions=True)
        pair.decode.abort(pair.link, [1])
        await pair.all_free()
        assert pair.prefill.idle
        assert pair.prefill.engine.steps < 13


async def test_kv_is_pulled_while_prefill_goes_on() -> None:
    async with Pair(step_seconds=0.03) as pair:
        one = request("chunks", 200, new=2)
        pair.start(1, one)
        prefill = asyncio.create_task(pair.hand_off(1, one))
        target = pair.executors[1].store
        await pair.until(lambda: any(bytes(target.block(i)) != b"\xff" * 16 for i in range(64)))
        assert not prefill.done()
        await prefill
        assert (await pair.finished(1)).tokens[0] == expected(one)


async def test_a_first_token_that_is_the_last_leaves_no_lease(pair: Pair) -> None:
    one = request("short", 9, new=1)
    pair.start(1, one)
    await pair.hand_off(1, one)
    pair.decode.abort(pair.link, [1])
    assert pair.heard[1].tokens[0] == expected(one)
    await pair.all_free()


async def test_a_sequence_that_nobody_wants_any_more_ends_and_its_siblings_go_on(
    pair: Pair,
) -> None:
    one = request("three", 13, new=60, n=3, seed=7)
    pair.start(1, one, local=True)
    await pair.until(lambda: len(pair.heard[1].tokens) == 3)
    pair.decode.abort_sequences(pair.link, 1, [1, 9])
    pair.decode.abort_sequences(pair.link, 8, [0])
    heard = await pair.finished(1, sequences=2)
    assert set(heard.finished) == {0, 2}
    assert {index: heard.tokens[index] for index in (0, 2)} == {
        index: expected(one, index) for index in (0, 2)
    }
    assert len(heard.tokens[1]) < 60
    await pair.until(lambda: pair.decode.idle)
    await pair.all_free()


async def test_a_request_without_wanted_sequences_is_over(pair: Pair) -> None:
    pair.start(1, request("two", 13, new=200, n=2, seed=7), local=True)
    await pair.until(lambda: len(pair.heard[1].tokens) == 2)
    pair.decode.abort_sequences(pair.link, 1, [0, 1])
    assert pair.decode.idle
    await pair.all_free()


async def test_a_sequence_unwanted_before_its_kv_is_here_still_gives_it_to_its_siblings(
    pair: Pair,
) -> None:
    one = request("early", 13, new=6, n=3, seed=7)
    pair.start(1, one)
    pair.decode.abort_sequences(pair.link, 1, [0])
    await pair.hand_off(1, one)
    heard = await pair.finished(1, sequences=2)
    assert heard.finished.keys() == {1, 2}
    assert heard.tokens == {0: expected(one)[:1], 1: expected(one, 1), 2: expected(one, 2)}
    arrived = heard.event("kv_arrived")
    assert arrived is not None
    assert not arrived.kv_arrived.recomputed
    await pair.all_free()


async def test_a_gateway_that_leaves_takes_its_requests_along(pair: Pair) -> None:
    pair.start(1, request("running", 5, new=200), local=True)
    pair.start(2, request("reserved", 50, new=5))
    await pair.until(lambda: pair.heard[1].tokens)
    pair.decode.disconnect(pair.link)
    assert pair.decode.idle
    await pair.all_free()


async def test_a_reservation_without_a_prefill_expires(pair: Pair) -> None:
    pair.start(1, request("forgotten", 50, new=5))
    await pair.until(lambda: pair.heard[1].event("failed"))
    failed = pair.heard[1].event("failed")
    assert failed is not None
    assert failed.failed.code == code_pb2.RESOURCE_EXHAUSTED
    await pair.all_free()


async def test_what_can_never_fit_and_what_does_not_fit_now_are_told_apart(pair: Pair) -> None:
    pair.start(1, request("never", 250, new=50))
    pair.start(2, request("big", 200, new=5))
    pair.start(3, request("later", 200, new=5))
    await pair.until(lambda: all(pair.heard[slot].events for slot in (1, 2, 3)))
    codes = {slot: event.failed.code for slot in (1, 3) if (event := pair.heard[slot].events[0])}
    assert codes == {1: code_pb2.INVALID_ARGUMENT, 3: code_pb2.RESOURCE_EXHAUSTED}
    assert pair.heard[2].event("reserved") is not None


async def test_reports_name_only_what_is_claimed_here(pair: Pair) -> None:
    pair.start(1, request("reserved", 10, new=5))
    pair.start(2, request("running", 5, new=150), local=True)
    await pair.until(lambda: pair.heard[2].tokens)
    (entry,) = pair.decode.progress()
    assert (entry.request_id, entry.fence) == ("running", 2)
    assert entry.generated >= 1
    assert entry.served > 0


async def test_a_stale_claim_ends_the_request_here(pair: Pair) -> None:
    pair.start(1, request("stolen", 5, new=200), local=True)
    await pair.until(lambda: pair.heard[1].tokens)
    (entry,) = pair.decode.progress()
    pair.decode.drop(entry, Verdict.STALE)
    await pair.until(lambda: pair.heard[1].event("failed"))
    failed = pair.heard[1].event("failed")
    assert failed is not None
    assert failed.failed.code == code_pb2.ABORTED
    await pair.all_free()
