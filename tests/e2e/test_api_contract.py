"""The public API does what the comments of its protos say: requests, queue, models, status."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import grpc
import pytest
import torch
from grpc_status import rpc_status

from baton import wire
from baton.client import Client, Started
from baton.errors import AlreadyExists, NotFound, Overloaded
from baton.v1 import generation_pb2, model_pb2
from baton.v1.model_pb2_grpc import AdminServiceStub
from queueing.contract import Role, WorkerRecord
from tests.e2e.answers import DEMO, PROMPT, ask, status_of
from tests.e2e.conftest import Run, Stack
from tests.engine.conftest import TinyModel

pytestmark = pytest.mark.asyncio(loop_scope="module")

LOOK = model_pb2.GetStatusRequest()


# -- Requests and their names ------------------------------------------------------------------


async def test_a_request_without_an_id_takes_that_of_its_metadata(client: Client) -> None:
    message = generation_pb2.GenerateRequest(token_ids={"ids": PROMPT}, stopping={"max_tokens": 3})
    metadata = (("traceparent", "00-" + "a" * 32 + "-" + "b" * 16 + "-01"), ("x-request-id", "it"))
    responses = [r async for r in client.generation.Generate(message, metadata=metadata)]
    assert {response.request_id for response in responses} == {"it"}
    message.request_id = "mine"
    responses = [r async for r in client.generation.Generate(message, metadata=metadata)]
    assert {response.request_id for response in responses} == {"mine"}
    code, text = await status_of(
        client.generation.Generate(
            generation_pb2.GenerateRequest(prompt="5"), metadata=(("x-request-id", "a b"),)
        )
    )
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "request_id" in text


async def test_labels_are_in_the_log_and_nowhere_else(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gateway.core")
    plain = await ask(client, temperature=1.0, seed=5)
    accepted_without_effect: dict[str, Any] = {
        "labels": {"team": "a\nb"},
        "session_id": "s",
        "user": "somebody",
        "priority": 7,
        "cache": generation_pb2.CacheOptions(bypass_prefix_cache=True, salt="salt"),
        "resume_window": {"seconds": 5},
        "extra": {"unknown": 1},
    }
    labelled = await ask(client, temperature=1.0, seed=5, **accepted_without_effect)
    assert labelled.ids == plain.ids
    assert caplog.messages[-1].endswith('20 output tokens, labels {"team": "a\\nb"}')


async def test_an_id_is_unique_among_live_requests(client: Client) -> None:
    stream = client.generate(PROMPT, max_tokens=3000, ignore_eos=True, request_id="one")
    await anext(stream)
    with pytest.raises(AlreadyExists):
        await ask(client, request_id="one")
    await stream.aclose()
    assert (await ask(client, request_id="one")).usage.completion_tokens == 20


@pytest.mark.parametrize("field", ["model", "adapter"])
async def test_an_unknown_name_is_told_back_in_bounds(client: Client, field: str) -> None:
    with pytest.raises(NotFound) as caught:
        await ask(client, **{field: "x" * 100_000})
    assert (caught.value.kind, caught.value.name) == (field, "x" * 128)


# -- Prompts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefill", [0, 1])
async def test_prompt_logprobs_have_an_entry_per_token_of_any_prompt(
    run_stack: Run, model: TinyModel, prefill: int
) -> None:
    async with (
        run_stack(model.path, dtype="float32", prefill=prefill, block_size=4) as stack,
        stack.client() as client,
    ):
        for length in (1, 2, 4, 30):
            for alternatives in (0, 3):
                prompt = PROMPT[:length]
                answer = await ask(client, prompt, prompt_logprobs=alternatives, max_tokens=2)
                first, *others = answer.accepted.prompt_logprobs
                assert [first.token_id, *(entry.token_id for entry in others)] == prompt
                assert not first.HasField("logprob")
                assert {len(entry.top) for entry in others} <= {alternatives}


async def test_numbers_that_json_does_not_have_are_refused_in_chats(run_stack: Run) -> None:
    async with run_stack(DEMO) as stack, stack.client() as client:
        for number in (float("nan"), float("inf")):
            message = generation_pb2.GenerateRequest(chat={"messages": [{"role": "user"}]})
            message.chat.template_kwargs["key"] = number
            code, text = await status_of(client.generation.Generate(message))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "chat.template_kwargs" in text
            message.chat.messages[0].extra["key"] = number
            message.chat.ClearField("template_kwargs")
            code, text = await status_of(client.generation.Generate(message))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "chat.messages[0].extra" in text


# -- The queue ---------------------------------------------------------------------------------


async def test_a_full_worker_takes_the_highest_priority_first(
    run_stack: Run, model: TinyModel
) -> None:
    order: list[str] = []

    async def one(client: Client, name: str, **options: Any) -> None:
        await ask(client, [5] * 20, request_id=name, **options)
        order.append(name)

    async with (
        run_stack(model.path, max_batch_sequences=1, dtype="float32") as stack,
        stack.client() as client,
    ):
        hog = asyncio.create_task(one(client, "hog", max_tokens=600, priority=1000))
        await asyncio.sleep(0.1)
        lows = [asyncio.create_task(one(client, f"low-{i}", priority=-1)) for i in range(4)]
        await asyncio.sleep(0.1)
        highs = [asyncio.create_task(one(client, f"high-{i}", priority=1)) for i in range(3)]
        await asyncio.gather(hog, *lows, *highs)
    classes = [name.partition("-")[0] for name in order]
    classes.remove("low")  # one waits on the worker, out of the queue's order, since before
    assert classes == ["hog"] + ["high"] * 3 + ["low"] * 3


async def test_waiting_requests_can_be_aborted_and_give_up(
    run_stack: Run, model: TinyModel
) -> None:
    async with run_stack(model.path) as stack, stack.client() as client:
        await asyncio.gather(*(server.stop(0) for server in (*stack.prefill, *stack.decode)))
        aborted = asyncio.create_task(ask(client, n=2, request_id="gone"))
        message = generation_pb2.GenerateRequest(
            token_ids={"ids": PROMPT}, queue_timeout={"nanos": 200_000_000}
        )
        started = time.monotonic()
        call = client.generation.Generate(message)
        await asyncio.sleep(0.05)
        assert await client.abort("gone", "gone", "nobody") == ["gone"]
        answer = await aborted
        assert {ended.reason for ended in answer.ended} == {generation_pb2.FINISH_REASON_ABORTED}
        assert answer.usage.completion_tokens == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        assert 0.2 <= time.monotonic() - started < 2
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        status = rpc_status.from_call(caught.value)
        kinds = [detail.type_url.rpartition(".")[2] for detail in status.details]
        assert kinds == ["RetryInfo", "QuotaFailure"]


async def test_a_tenant_has_a_quota(run_stack: Run, model: TinyModel) -> None:
    settings = {"max_requests_per_tenant": 1}
    async with (
        run_stack(model.path, gateway_settings=settings) as stack,
        stack.client() as client,
    ):
        stream = client.generate(PROMPT, max_tokens=3000, ignore_eos=True, user="one")
        await anext(stream)
        with pytest.raises(Overloaded) as caught:
            await ask(client, user="one")
        assert caught.value.subject == "tenant requests"
        await ask(client, user="two")
        await stream.aclose()


# -- What comes back ---------------------------------------------------------------------------


async def test_deltas_wait_for_the_interval_but_the_first(client: Client) -> None:
    answer = await ask(client, max_tokens=30, stream_interval=7)
    first, *others, last = [delta.token_count for delta in answer.deltas(0)]
    assert first == 1
    assert all(count >= 7 for count in others)
    assert first + sum(others) + last == 30


async def test_unary_and_streaming_say_the_same(client: Client) -> None:
    options: dict[str, Any] = {
        "n": 3,
        "temperature": 0.9,
        "seed": 4,
        "logprobs": 2,
        "prompt_logprobs": 1,
        "stop": ["55"],
        "max_tokens": 25,
        "token_ids": True,
        "request_id": "same",
    }
    streamed = await ask(client, **options, ignore_eos=False)
    unary = (await client.generate_unary(PROMPT, **options)).message
    assert unary.request_id == "same"
    assert unary.usage == streamed.usage
    assert list(unary.finished) == streamed.ended
    assert [output.text for output in unary.outputs] == streamed.texts
    assert [list(output.token_ids) for output in unary.outputs] == streamed.ids
    assert [output.token_count for output in unary.outputs] == [len(ids) for ids in streamed.ids]

    def facts(entries: Any) -> list[tuple[int, bytes, int, list[int]]]:
        return [(e.token_id, e.token, e.rank, [t.token_id for t in e.top]) for e in entries]

    assert facts(unary.accepted.prompt_logprobs) == facts(streamed.accepted.prompt_logprobs)
    for index, output in enumerate(unary.outputs):
        assert facts(output.logprobs) == facts(streamed.logprobs(index))


@pytest.mark.parametrize("prefill", [0, 1])
async def test_timings_add_up(run_stack: Run, model: TinyModel, prefill: int) -> None:
    async with run_stack(model.path, prefill=prefill) as stack, stack.client() as client:
        started = time.monotonic()
        answer = await ask(client, [5] * 300, n=2, timing=True)
        passed = time.monotonic() - started
        for ended in answer.ended:
            timing = ended.timing
            queue, prefilled, first, decode = (
                wire.seconds(part)
                for part in (
                    timing.queue,
                    timing.prefill,
                    timing.time_to_first_token,
                    timing.decode,
                )
            )
            assert 0 < prefilled < queue + prefilled <= first
            assert first + decode <= passed
            assert bool(wire.seconds(timing.kv_transfer)) is bool(prefill)
        assert not (await ask(client)).ended[0].HasField("timing")


# -- Models and status -------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("auto", "auto"), ("float32", "int8")])
async def test_models_are_listed_with_the_number_formats_that_run(
    run_stack: Run, dtype: str, kv_dtype: str
) -> None:
    formats = {"dtype": dtype, "kv_dtype": kv_dtype}
    async with run_stack(DEMO, **formats, kv_memory=2**24) as stack, stack.client() as client:
        (listed,) = await client.list_models()
        own = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
        runs = own if dtype == "auto" else dtype
        kept = runs if kv_dtype == "auto" else kv_dtype
        assert (listed.weight_dtype, listed.kv_dtype) == (runs, kept)
        assert listed.revision
        assert listed.max_context_tokens == 1024
        accepted = (await ask(client, "x", model=listed.name, max_tokens=1)).accepted
        assert accepted.model == listed.name


async def test_one_look_at_the_status_tells_rates_and_what_runs(
    stack: Stack, client: Client
) -> None:
    admin = AdminServiceStub(client.channel)
    streams = [client.generate(PROMPT, n=2, max_tokens=2000, ignore_eos=True) for _ in range(3)]
    for stream in streams:
        assert isinstance(await anext(stream), Started)
    async with asyncio.timeout(20):  # reports and looks at them are 100 and 250 ms apart
        while not _all_run(stack.gateway.gateway.fleet.records, 6):
            await asyncio.sleep(0.01)
    status = (await admin.GetStatus(LOOK)).status
    assert status.output_tokens_per_second > 0
    decode, prefill = status.workers
    assert status.running_requests == 3
    assert decode.running_sequences == 6
    assert 0 < decode.free_kv_blocks < decode.total_kv_blocks
    assert decode.steps_per_second > 0
    assert prefill.running_sequences == 0
    assert not any(level.waiting_requests for level in status.levels)
    await asyncio.gather(*(stream.aclose() for stream in streams))
    await stack.quiet()
    assert (await admin.GetStatus(LOOK)).status.running_requests == 0


def _all_run(workers: list[WorkerRecord], sequences: int) -> bool:
    """Whether so many sequences run on the decode worker, and none elsewhere, by the registry."""
    loads = {worker.role: worker.load for worker in workers}
    decode, prefill = loads[Role.DECODE], loads[Role.PREFILL]
    assert decode is not None and prefill is not None
    return (decode.running, prefill.running) == (sequences, 0) and decode.steps_per_second > 0
