"""The gateway over sockets: real gRPC, a real Redis, workers that follow a script."""

from __future__ import annotations

import asyncio

import pytest
from google.protobuf.duration_pb2 import Duration

from baton.client import Ended, Started, Text, Totals
from baton.errors import AlreadyExists, DeadlineExceeded, InvalidRequest, NotFound, Unsupported


async def collect(stream) -> list:
    return [event async for event in stream]


def text_of(events, index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Text) and e.index == index)


async def test_a_stream_starts_with_accepted_and_ends_with_usage(pair, expected):
    events = await collect(pair.client.generate("hello", max_tokens=10, timing=True))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Totals)
    assert isinstance(events[-2], Ended)
    assert text_of(events) == expected(10)
    assert events[-2].reason == "length"
    assert events[-2].completion_tokens == 10
    prompt = events[0].prompt_tokens
    assert (events[-1].prompt_tokens, events[-1].completion_tokens) == (prompt, 10)
    timing = events[-2].message.timing
    assert timing.prefill.ToMilliseconds() == 250
    assert timing.time_to_first_token.ToMicroseconds() > 0
    assert pair.d.attached == [1]
    assert not pair.d.started[0].local_prefill


async def test_the_first_token_comes_from_the_prefill_worker(pair):
    pair.d.paused = True
    stream = pair.client.generate("hello", max_tokens=5)
    events = [await anext(stream), await anext(stream)]
    assert isinstance(events[1], Text)
    assert events[1].token_count == 1
    await stream.aclose()


async def test_one_token_needs_no_decode(pair, eventually):
    events = await collect(pair.client.generate("hello", max_tokens=1))
    assert events[-1].completion_tokens == 1
    await eventually(lambda: pair.d.aborted == [1])


async def test_unary_returns_everything_at_once(pair, expected):
    answer = await pair.client.generate_unary("hello", max_tokens=8, token_ids=True, seed=7)
    assert answer.text == expected(8)
    assert answer.reasons == ("length",)
    assert answer.message.finished[0].seed == 7
    assert len(answer.message.outputs[0].token_ids) == 8


async def test_prompt_tokens_from_a_cache_are_told_in_the_usage(pair):
    pair.p.cached_tokens = 3
    events = await collect(pair.client.generate("hello", max_tokens=3))
    assert events[-1].message.cached_tokens == 3
    answer = await pair.client.generate_unary("hello", max_tokens=3)
    assert answer.message.usage.cached_tokens == 3
    assert answer.message.accepted.cached_tokens == 3


async def test_workers_are_told_whose_prefixes_a_request_may_use(pair):
    cache = {"salt": "mine", "bypass_prefix_cache": True}
    await pair.client.generate_unary("hello", max_tokens=3, cache=cache)
    await pair.client.generate_unary("hello", max_tokens=3)
    first, second = pair.p.requests
    assert (first.request.cache_salt, first.request.bypass_prefix_cache) == ("mine", True)
    assert (second.request.cache_salt, second.request.bypass_prefix_cache) == ("", False)
    assert pair.d.started[0].request.cache_salt == "mine"


async def test_chat_and_token_ids_are_inputs_too(pair, expected):
    events = await collect(pair.client.chat("hi", max_tokens=3))
    assert text_of(events) == expected(3)
    answer = await pair.client.generate_unary([5, 6, 7], max_tokens=3)
    assert answer.text == expected(3)
    assert list(pair.p.requests[-1].request.prompt_token_ids) == [5, 6, 7]


async def test_without_prefill_workers_the_decode_worker_prefills(cluster, expected):
    await cluster.start()
    decode = await cluster.decode()
    await cluster.ready()
    answer = await cluster.client.generate_unary("hello", max_tokens=6)
    assert answer.text == expected(6)
    assert decode.started[0].local_prefill


async def test_a_request_waits_for_workers_to_come(cluster, expected):
    await cluster.start()
    answer = asyncio.create_task(cluster.client.generate_unary("hello", max_tokens=4))
    await asyncio.sleep(0.1)
    await cluster.decode()
    assert (await answer).text == expected(4)


async def test_several_sequences_end_one_by_one(pair, expected):
    events = await collect(pair.client.generate("hello", n=3, max_tokens=6))
    assert [text_of(events, i) for i in range(3)] == [expected(6)] * 3
    assert sorted(e.index for e in events if isinstance(e, Ended)) == [0, 1, 2]
    assert events[-1].completion_tokens == 18


async def test_a_stop_string_ends_the_sequence_and_frees_the_slot(pair, expected, eventually):
    stop = expected(10)[6:8]
    events = await collect(pair.client.generate("hello", max_tokens=150, stop=[stop]))
    assert text_of(events) == expected(10)[:6]
    assert events[-2].message.stop == stop
    assert events[-2].completion_tokens == 8
    await eventually(lambda: not pair.d.slots)


async def test_a_worker_is_told_which_sequence_a_stop_string_ended_before_the_others(
    pair, expected, eventually
):
    # The first sequence is ahead by the token that came with its prefill.
    stop = expected(10)[6:8]
    events = await collect(pair.client.generate("hello", n=3, max_tokens=9, stop=[stop]))
    assert [text_of(events, i) for i in range(3)] == [expected(10)[:6]] * 3
    await eventually(lambda: not pair.d.slots)
    assert pair.d.unwanted[0] == (1, [0])
    assert len(pair.d.unwanted) == 2
    assert pair.d.aborted == [1]


async def test_a_stop_string_in_the_token_of_the_prefill_ends_that_sequence_alone(
    pair, expected, eventually
):
    options = {"n": 2, "max_tokens": 4, "stop": [expected(1)], "min_tokens": 0}
    events = await collect(pair.client.generate("hello", **options))
    assert {e.reason for e in events if isinstance(e, Ended)} == {"stop"}
    assert pair.d.unwanted == [(1, [0])]


async def test_stream_interval_holds_all_but_the_first_token(pair):
    events = await collect(pair.client.generate("hello", max_tokens=21, stream_interval=10))
    counts = [event.token_count for event in events if isinstance(event, Text)]
    assert counts[0] == 1
    assert sum(counts) == 21
    assert all(count >= 10 for count in counts[1:])


async def test_logprobs_carry_the_bytes_of_tokens(pair, expected):
    events = await collect(
        pair.client.generate("hello", max_tokens=4, logprobs=0, prompt_logprobs=0)
    )
    prompt = events[0].message.prompt_logprobs
    assert b"".join(entry.token for entry in prompt).endswith(b"hello")
    assert not prompt[0].HasField("logprob")
    entries = [entry for e in events if isinstance(e, Text) for entry in e.message.logprobs]
    assert b"".join(entry.token for entry in entries).decode() == expected(4)[1:]


async def test_many_requests_at_once_are_all_served(pair, expected):
    sizes = [1 + 7 * i % 40 for i in range(60)]
    answers = await asyncio.gather(
        *(pair.client.generate_unary("hello " * (1 + size % 5), max_tokens=size) for size in sizes)
    )
    assert [answer.text for answer in answers] == [expected(size) for size in sizes]


async def test_cancelling_frees_the_slot_and_the_id(pair, eventually):
    pair.d.paused = True
    stream = pair.client.generate("hello", max_tokens=100, request_id="mine")
    await anext(stream)
    await anext(stream)
    with pytest.raises(AlreadyExists):
        await pair.client.generate_unary("hello", request_id="mine")
    await stream.aclose()
    await eventually(lambda: not pair.d.slots and not len(pair.server.gateway.sessions))


async def test_cancelling_during_prefill_cancels_the_prefill(pair, eventually):
    pair.p.delay = 30.0
    stream = pair.client.generate("hello", max_tokens=100)
    await anext(stream)
    await eventually(lambda: bool(pair.p.held))
    await stream.aclose()
    await eventually(lambda: pair.p.cancelled == 1 and not pair.d.slots)


async def test_the_deadline_of_the_call_ends_it(pair, eventually):
    pair.d.paused = True
    with pytest.raises(DeadlineExceeded):
        await collect(pair.client.generate("hello", max_tokens=100, timeout=0.3))
    await eventually(lambda: not pair.d.slots)


async def test_the_servers_own_deadline_applies_to_calls_without_one(cluster):
    await cluster.start(request_timeout=0.3)
    decode = await cluster.decode()
    await cluster.ready()
    decode.paused = True
    with pytest.raises(DeadlineExceeded):
        await collect(cluster.client.generate("hello", max_tokens=100))


async def test_a_time_limit_keeps_the_partial_output(pair):
    pair.d.step = 0.02
    limit = Duration(nanos=300_000_000)
    events = await collect(pair.client.generate("hello", max_tokens=150, time_limit=limit))
    assert events[-2].reason == "time_limit"
    assert 0 < events[-1].completion_tokens < 150


async def test_abort_ends_a_stream_with_what_there_is(pair):
    pair.d.paused = True
    stream = pair.client.generate("hello", max_tokens=100, request_id="a")
    events = [await anext(stream), await anext(stream)]
    assert await pair.client.abort("a", "unknown") == ["a"]
    events += [event async for event in stream]
    assert events[-2].reason == "aborted"
    assert events[-1].completion_tokens == 1
    assert await pair.client.abort("a") == []


async def test_a_slow_reader_gets_everything_in_few_messages(pair, expected):
    stream = pair.client.generate("hello", max_tokens=150)
    events = [await anext(stream)]
    session = next(iter(pair.server.gateway.sessions))
    await session.done.wait()  # nobody reads, and generation is over
    events += [event async for event in stream]
    assert text_of(events) == expected(150)


async def test_errors_of_the_caller_have_their_status(pair):
    with pytest.raises(InvalidRequest) as caught:
        await pair.client.generate_unary("", top_p=3.0)
    assert {v.field for v in caught.value.violations} == {"prompt", "sampling.top_p"}
    with pytest.raises(NotFound):
        await pair.client.generate_unary("hello", model="other")
    with pytest.raises(Unsupported, match="structured_output"):
        await pair.client.generate_unary("hello", structured_output={"regex": "a"})
    assert (await pair.client.generate_unary("hello", max_tokens=1)).text


async def test_an_id_may_be_used_again_after_its_request(pair):
    for _ in range(3):
        answer = await pair.client.generate_unary("hello", max_tokens=2, request_id="again")
        assert answer.request_id == "again"
