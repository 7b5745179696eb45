"""Workers that refuse, die, freeze and leave: the client's stream has no gap and no duplicate."""

from __future__ import annotations

import asyncio
import time

import pytest

from baton.client import Text
from baton.errors import InvalidRequest, Overloaded, Unavailable

RESOURCE_EXHAUSTED, INVALID_ARGUMENT, INTERNAL = 8, 3, 13


async def answers(client, count: int, size: int) -> set[str]:
    """Distinct texts of several requests at once."""
    calls = (client.generate_unary("hello", max_tokens=size) for _ in range(count))
    return {answer.text for answer in await asyncio.gather(*calls)}


async def test_a_dying_decode_worker_loses_nothing(pair, expected):
    other = await pair.decode("decode-1")
    await pair.ready()
    pair.d.dies_after = other.dies_after = 20
    assert await answers(pair.client, 8, 60) == {expected(60)}


async def test_a_stream_goes_on_where_its_decode_worker_died(pair, expected, eventually):
    pair.d.step = 0.02
    stream = pair.client.generate("hello", max_tokens=50)
    text = ""
    async for event in stream:
        if isinstance(event, Text):
            text += event.text
            if pair.d in pair.workers and len(text) > 10:
                pair.workers.remove(pair.d)
                await pair.d.kill()
                await pair.decode("decode-1")
    assert text == expected(50)
    resumed = pair.workers[-1].started[0].request.prior_outputs[0]
    assert 10 < len(resumed.token_ids) <= 50


async def test_a_later_attempt_does_not_change_how_the_first_token_came(pair):
    other = await pair.decode("decode-1")
    await pair.ready()
    pair.d.step = other.step = 0.01
    pair.d.dies_after = other.dies_after = 20
    answer = await pair.client.generate_unary("hello", max_tokens=30, timing=True)
    assert len(pair.d.started + other.started) == 2
    timing = answer.message.finished[0].timing
    assert timing.queue.ToSeconds() == 0
    assert timing.queue.ToMicroseconds() <= timing.time_to_first_token.ToMicroseconds()


async def test_a_frozen_decode_worker_is_given_up(pair, expected, eventually):
    pair.d.paused = True
    answer = asyncio.create_task(pair.client.generate_unary("hello", max_tokens=5))
    await eventually(lambda: bool(pair.d.held))
    await pair.d.freeze()
    await pair.decode("decode-1")
    assert (await asyncio.wait_for(answer, 10)).text == expected(5)


async def test_finished_sequences_are_not_generated_again(pair, expected, eventually):
    stop = expected(10)[0:3]  # ends nothing: the first token is taken before the failure
    pair.d.dies_after = 5
    answer = await pair.client.generate_unary("hello", n=2, max_tokens=12, stop=[stop + "!"])
    assert answer.texts == (expected(12), expected(12))


async def test_sequence_zero_may_have_ended_before_the_failure(pair, expected, eventually):
    pair.d.paused = True
    stream = pair.client.generate("hello", n=2, max_tokens=6, stop=[expected(1)])
    await anext(stream)
    await eventually(lambda: bool(pair.d.held))  # sequence 0 ended with its first token
    pair.workers.remove(pair.d)
    await pair.d.kill()
    other = await pair.decode("decode-1")
    events = [event async for event in stream]
    assert {e.index for e in events if hasattr(e, "reason")} == {0, 1}
    assert other.started[0].local_prefill
    assert other.started[0].request.prior_outputs[0].finished


async def test_a_failing_prefill_worker_is_gone_around(pair, expected):
    pair.p.failures = [Unavailable("going down")]
    answer = await pair.client.generate_unary("hello", max_tokens=5)
    assert answer.text == expected(5)
    assert [start.local_prefill for start in pair.d.started] == [False, True]
    assert pair.d.started[1].claim.attempt == 2
    await asyncio.sleep(0.2)
    await pair.client.generate_unary("hello", max_tokens=5)
    assert not pair.d.started[2].local_prefill  # it is well again


async def test_attempts_are_bounded(pair):
    pair.d.refusals = [INTERNAL] * 10
    with pytest.raises(Unavailable, match="4 workers failed"):
        await pair.client.generate_unary("hello", max_tokens=5)
    assert len(pair.d.refusals) == 6
    pair.d.refusals = []
    assert (await pair.client.generate_unary("hello", max_tokens=5)).text


async def test_when_the_prefill_worker_dies_the_decode_worker_does_it_all(
    pair, expected, eventually
):
    pair.p.delay = 60
    answer = asyncio.create_task(pair.client.generate_unary("hello", max_tokens=5))
    await eventually(lambda: bool(pair.p.held))
    pair.workers.remove(pair.p)
    await pair.p.kill()
    assert (await asyncio.wait_for(answer, 15)).text == expected(5)


async def test_a_worker_without_room_costs_no_attempt(pair, expected):
    pair.d.refusals = [RESOURCE_EXHAUSTED] * 6
    pair.p.failures = [Overloaded("full", subject="kv")] * 3
    answer = await pair.client.generate_unary("hello", max_tokens=5)
    assert answer.text == expected(5)
    assert pair.p.requests[-1].claim.attempt == 1


async def test_a_request_that_finds_no_room_times_out_in_the_queue(cluster):
    await cluster.start(queue_timeout=0.4)
    decode = await cluster.decode()
    await cluster.ready()
    decode.refusing = True
    with pytest.raises(Overloaded, match="no worker had room") as caught:
        await cluster.client.generate_unary("hello", max_tokens=5)
    assert caught.value.retry_after > 0
    decode.refusing = False
    assert (await cluster.client.generate_unary("hello", max_tokens=5)).text


async def test_a_request_that_can_never_fit_is_the_callers_error(pair):
    pair.d.refusals = [INVALID_ARGUMENT]
    with pytest.raises(InvalidRequest, match="refused"):
        await pair.client.generate_unary("hello", max_tokens=5)


async def test_an_internal_failure_of_a_slot_costs_an_attempt(pair, expected):
    pair.d.refusals = [INTERNAL]
    assert (await pair.client.generate_unary("hello", max_tokens=5)).text == expected(5)
    assert pair.d.started[-1].claim.attempt == 2


async def test_draining_lets_running_requests_finish(pair, expected, eventually):
    pair.d.step = 0.01
    answer = asyncio.create_task(pair.client.generate_unary("hello", max_tokens=40))
    await eventually(lambda: bool(pair.d.held))
    stop = asyncio.create_task(pair.server.stop(10))
    assert (await answer).text == expected(40)
    await stop


async def test_draining_ends_what_takes_too_long_with_what_it_has(pair, eventually):
    pair.d.paused = True
    stream = pair.client.generate("hello", max_tokens=40)
    events = [await anext(stream), await anext(stream)]
    stop = asyncio.create_task(pair.server.stop(0.2))
    events += [event async for event in stream]
    await stop
    assert events[-2].reason == "aborted"
    assert not pair.d.slots


async def test_a_full_worker_is_not_asked_for_everything_that_waits(pair):
    pair.d.refusing = True
    calls = [
        asyncio.create_task(pair.client.generate_unary("hello", max_tokens=3)) for _ in range(100)
    ]
    begun = time.monotonic()
    await asyncio.sleep(0.5)
    asked, seconds = len(pair.d.started), time.monotonic() - begun
    pair.d.refusing = False
    await asyncio.gather(*calls)
    # About one salvo of 16 per rest of 50 ms; 100 per round unchecked.
    assert 0 < asked <= 800 * seconds


async def test_requests_are_spread_over_decode_workers(pair):
    other = await pair.decode("decode-1")
    await pair.ready()
    await answers(pair.client, 20, 100)
    assert min(len(pair.d.started), len(other.started)) >= 7
