"""What a client may do, and what may happen to a worker, without anybody else noticing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest
from redis.asyncio import Redis

from baton.client import Client, Ended, Started, Text, Totals
from baton.config import GatewayConfig
from baton.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    Unsupported,
)
from baton.v1 import generation_pb2
from tests.e2e.answers import CONTEXT
from tests.e2e.conftest import Run, Stack
from tests.engine.conftest import VOCAB, TinyModel

REPORT_INTERVAL = GatewayConfig.model_fields["report_interval"].default
LONG = 1000


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def read(stream: Any, tokens: int) -> list[int]:
    """At least so many tokens of a stream."""
    got: list[int] = []
    async for event in stream:
        if isinstance(event, Text):
            got += event.message.token_ids
            if len(got) >= tokens:
                break
    return got


def endless(client: Client, prompt: list[int], **options: Any) -> Any:
    return client.generate(prompt, max_tokens=LONG, ignore_eos=True, token_ids=True, **options)


async def test_a_cancelled_request_frees_everything_and_its_neighbour_goes_on(
    stack: Stack, client: Client, model: TinyModel
) -> None:
    doomed = endless(client, [5] * 40)
    neighbour = asyncio.create_task(
        read(client.generate([9] * 30, max_tokens=150, token_ids=True, ignore_eos=True), 150)
    )
    await read(doomed, 5)
    await doomed.aclose()
    cancelled_at = time.monotonic()
    while stack.decode[0].worker.load().running > 1:
        await asyncio.sleep(0.005)
    assert time.monotonic() - cancelled_at < REPORT_INTERVAL + 0.4  # 2 busy cores: some slack
    model.assert_generates([9] * 30, await neighbour)
    await stack.quiet()


async def test_a_deadline_ends_the_request_everywhere(stack: Stack, client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        await read(endless(client, [5] * 40, timeout=0.5), LONG)
    await stack.quiet()


async def test_abort_ends_a_stream_in_order_with_what_it_has(stack: Stack, client: Client) -> None:
    events = []
    async for event in endless(client, [7, 8], request_id="mine"):
        events.append(event)
        if len(events) == 4:
            assert await client.abort("mine", "nobody") == ["mine"]
    ended, totals = events[-2:]
    assert isinstance(ended, Ended)
    assert ended.reason == "aborted"
    assert isinstance(totals, Totals)
    assert totals.completion_tokens == ended.completion_tokens
    await stack.quiet()


async def test_a_time_limit_keeps_the_partial_output(stack: Stack, client: Client) -> None:
    message = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=[5, 6]),
        stopping=generation_pb2.StoppingParams(max_tokens=LONG, ignore_eos=True),
    )
    message.stopping.time_limit.FromMilliseconds(300)
    reasons, text = [], ""
    async for response in client.generation.Generate(message):
        text += response.delta.text
        if response.HasField("finished"):
            reasons.append(response.finished.reason)
    assert reasons == [generation_pb2.FINISH_REASON_TIME_LIMIT]
    assert text
    await stack.quiet()


async def test_a_reader_that_stands_still_delays_nobody(stack: Stack, client: Client) -> None:
    lazy = [endless(client, [3 + i] * 10) for i in range(4)]
    for stream in lazy:
        await anext(stream)  # accepted; nothing is read any more
    async with stack.client() as other:
        answer = await other.generate_unary([9] * 30, max_tokens=20, ignore_eos=True)
        assert answer.message.usage.completion_tokens == 20
    totals = [await read(stream, LONG) for stream in lazy]
    assert [len(tokens) for tokens in totals] == [LONG] * 4
    await stack.quiet()


async def test_events_come_in_the_documented_order(client: Client) -> None:
    events = [event async for event in client.generate([5, 6, 7], max_tokens=9, n=2, timing=True)]
    assert isinstance(events[0], Started)
    assert events[0].prompt_tokens == 3
    ended = [event for event in events if isinstance(event, Ended)]
    assert sorted(event.index for event in ended) == [0, 1]
    assert isinstance(events[-1], Totals)
    for end in ended:
        counted = sum(e.token_count for e in events if isinstance(e, Text) and e.index == end.index)
        assert counted == end.completion_tokens
        timing = end.message.timing
        assert timing.time_to_first_token.ToTimedelta() >= timing.prefill.ToTimedelta()
        assert timing.kv_transfer.ToTimedelta().total_seconds() > 0
        assert end.message.seed  # chosen by the server, echoed


async def test_unary_gives_what_streaming_gives(client: Client) -> None:
    options: dict[str, Any] = {"max_tokens": 25, "temperature": 0.9, "seed": 4, "n": 2}
    streamed = {0: "", 1: ""}
    async for event in client.generate("5 6 7", **options):
        if isinstance(event, Text):
            streamed[event.index] += event.text
    answer = await client.generate_unary("5 6 7", **options)
    assert dict(enumerate(answer.texts)) == streamed


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"token_ids": {"ids": []}}, "token_ids"),
    "empty text": ({"prompt": ""}, "prompt"),
    "id out of range": ({"token_ids": {"ids": [VOCAB]}}, "token_ids"),
    "prompt over the context": ({"token_ids": {"ids": [5] * (CONTEXT + 50)}}, "token_ids"),
    "max_tokens 0": ({"stopping": {"max_tokens": 0}}, "stopping.max_tokens"),
    "NaN": ({"sampling": {"temperature": float("nan")}}, "sampling.temperature"),
    "negative": ({"sampling": {"temperature": -1}}, "sampling.temperature"),
    "top_p": ({"sampling": {"top_p": 1.5}}, "sampling.top_p"),
    "n": ({"sampling": {"n": 10_000}}, "sampling.n"),
    "logprobs": ({"response": {"logprobs": 10_000}}, "response.logprobs"),
    "stop list": ({"stopping": {"stop": ["x"] * 1000}}, "stopping.stop"),
}


@pytest.mark.parametrize("case", BAD)
async def test_bad_input_is_named_and_costs_nobody_anything(client: Client, case: str) -> None:
    fields, named = BAD[case]
    if not {"prompt", "token_ids"} & set(fields):
        fields = fields | {"token_ids": {"ids": [5]}}
    call = client.generation.Generate(generation_pb2.GenerateRequest(**fields))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert named in (caught.value.details() or "")
    assert (await client.generate_unary([5], max_tokens=2)).message.usage.completion_tokens == 2


async def test_unknown_models_adapters_and_features_are_refused(client: Client) -> None:
    for options, error in (
        ({"model": "gpt-5"}, NotFound),
        ({"adapter": "lora"}, NotFound),
        ({"structured_output": generation_pb2.StructuredOutput(regex="a+")}, Unsupported),
    ):
        with pytest.raises(error):
            await client.generate_unary([5], max_tokens=2, **options)


async def test_ten_megabytes_of_prompt_are_refused_and_the_server_goes_on(client: Client) -> None:
    with pytest.raises((InvalidRequest, Overloaded)):
        await client.generate_unary("5 " * 5_000_000, max_tokens=2)
    await client.generate_unary([5], max_tokens=2)


async def test_a_prefill_worker_that_leaves_is_replaced_by_local_prefill(
    run_stack: Run, model: TinyModel
) -> None:
    prompt = list(range(20, 60))
    async with run_stack(model.path, dtype="float32") as stack, stack.client() as client:
        await stack.prefill[0].stop(0)
        output = await read(client.generate(prompt, max_tokens=12, token_ids=True), 12)
    model.assert_generates(prompt, output)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "seeded"])
async def test_a_stream_survives_its_decode_worker(
    run_stack: Run, model: TinyModel, options: dict[str, Any]
) -> None:
    prompt = list(range(20, 60))
    async with run_stack(model.path, decode=2, dtype="float32") as stack, stack.client() as client:
        expected = await read(endless(client, prompt, **options), 120)
        stream = endless(client, prompt, **options)
        got = await read(stream, 7)
        busy = next(server for server in stack.decode if not server.worker.idle)
        await busy.stop(0)
        got += await read(stream, 120 - len(got))
        await stream.aclose()
    assert got[:120] == expected[:120]


async def test_without_any_worker_the_client_is_told_when_to_come_back(
    run_stack: Run, model: TinyModel
) -> None:
    async with (
        run_stack(model.path, gateway_settings={"queue_timeout": 0.5}, dtype="float32") as stack,
        stack.client() as client,
    ):
        await stack.prefill[0].stop(0)
        await stack.decode[0].stop(0)
        with pytest.raises(Overloaded) as caught:
            await client.generate_unary([5], max_tokens=2)
        assert caught.value.retry_after > 0


async def test_counters_and_histograms_tell_what_happened(stack: Stack, client: Client) -> None:
    await client.generate_unary([5, 6, 7], max_tokens=8, ignore_eos=True)
    with contextlib.suppress(InvalidRequest):
        await client.generate_unary([5], max_tokens=0)
    exposed = generate_latest(stack.metrics).decode()
    for name in (
        "baton_requests_total",
        "baton_prompt_tokens_total",
        "baton_generation_tokens_total",
        "baton_time_to_first_token_seconds_bucket",
        "baton_time_per_output_token_seconds_bucket",
        "baton_queue_depth",
    ):
        assert name in exposed, name


async def test_a_hundred_requests_of_all_kinds_leave_nothing_behind(
    stack: Stack, client: Client
) -> None:
    async def one(i: int) -> None:
        stream = client.generate(
            [3 + i] * (1 + i % 50), max_tokens=1 + i % 30, n=1 + i % 3, temperature=i % 2
        )
        if i % 5 == 0:
            await anext(stream)
            await stream.aclose()
        else:
            async for _ in stream:
                pass

    await asyncio.gather(*(one(i) for i in range(100)))
    await stack.quiet()


async def test_redis_is_not_asked_per_token(stack: Stack, client: Client, redis_url: str) -> None:
    redis = Redis.from_url(redis_url)

    async def calls() -> int:
        stats = await redis.info("commandstats")
        return int(stats["cmdstat_evalsha"]["calls"])

    before, began = await calls(), time.monotonic()
    await asyncio.gather(*(read(endless(client, [5 + i] * 4), LONG) for i in range(8)))
    made, seconds = await calls() - before, time.monotonic() - began
    await redis.aclose()
    # Reports, polls and heartbeats go by the clock; eight requests add a few calls each.
    assert made < 8 * 10 + 60 * seconds
    assert made < 8 * LONG / 10
