"""The public API does what the comments of its protos say, field by field."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

import demo_model
from baton.client import Client, Ended, Event, Started, Text, Totals
from baton.errors import AlreadyExists
from baton.v1 import generation_pb2, model_pb2
from baton.v1.model_pb2_grpc import AdminServiceStub
from tests.e2e.conftest import Run, Stack, name_every_token
from tests.engine.conftest import CONFIGS, TinyModel, save_model

PROMPT = list(range(20, 50))
CONTEXT = 4096
DEMO = demo_model.path()
LOOK = model_pb2.GetStatusRequest()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A tiny Llama whose token 17 is written "17"."""
    path = tmp_path_factory.mktemp("llama")
    config = CONFIGS["llama"]()
    config.max_position_embeddings = CONTEXT
    made = save_model(config, path)
    name_every_token(path)
    return made


@pytest.fixture
async def stack(run_stack: Run, model: TinyModel) -> AsyncIterator[Stack]:
    async with run_stack(model.path, dtype="float32", max_batch_tokens=64) as running:
        yield running
        await running.quiet()
        assert not running.gateway.gateway.sessions.waiting


@pytest.fixture
async def client(stack: Stack) -> AsyncIterator[Client]:
    async with stack.client() as connected:
        yield connected


@dataclass
class Answer:
    """A whole stream: texts, token ids and endings by sequence."""

    events: list[Event]
    texts: list[str]
    ids: list[list[int]]
    ended: list[generation_pb2.Finished]

    @property
    def accepted(self) -> generation_pb2.Accepted:
        started = self.events[0]
        assert isinstance(started, Started)
        return started.message

    @property
    def usage(self) -> generation_pb2.Usage:
        totals = self.events[-1]
        assert isinstance(totals, Totals)
        return totals.message

    def logprobs(self, index: int) -> list[generation_pb2.TokenLogprob]:
        return [entry for delta in self.deltas(index) for entry in delta.logprobs]

    def deltas(self, index: int) -> list[generation_pb2.Delta]:
        return [e.message for e in self.events if isinstance(e, Text) and e.index == index]


async def ask(client: Client, prompt: Any = PROMPT, n: int = 1, **options: Any) -> Answer:
    """A stream to its end, with token ids and past end-of-sequence unless told otherwise."""
    options = {"token_ids": True, "ignore_eos": True, "max_tokens": 20} | options
    answer = Answer([e async for e in client.generate(prompt, n=n, **options)], [], [], [])
    for index in range(n):
        answer.texts.append("".join(delta.text for delta in answer.deltas(index)))
        answer.ids.append([t for delta in answer.deltas(index) for t in delta.token_ids])
    ended = {e.index: e.message for e in answer.events if isinstance(e, Ended)}
    answer.ended = [ended[index] for index in range(n)]
    return answer


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """Code and text of a call's refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value.code(), caught.value.details() or ""


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


# -- Models and status -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "float32"])
async def test_models_are_listed_with_the_number_format_that_runs(
    run_stack: Run, dtype: str
) -> None:
    async with run_stack(DEMO, dtype=dtype) as stack, stack.client() as client:
        (listed,) = await client.list_models()
        runs = "bfloat16" if dtype == "auto" else dtype
        assert (listed.weight_dtype, listed.kv_dtype) == (runs, runs)
        assert listed.revision
        assert listed.max_context_tokens == 1024
        accepted = (await ask(client, "x", model=listed.name, max_tokens=1)).accepted
        assert accepted.model == listed.name


async def test_one_look_at_the_status_tells_rates_and_what_runs(
    stack: Stack, client: Client
) -> None:
    admin = AdminServiceStub(client.channel)
    streams = [client.generate(PROMPT, n=2, max_tokens=3000, ignore_eos=True) for _ in range(3)]
    for stream in streams:
        assert isinstance(await anext(stream), Started)
    await asyncio.sleep(0.8)  # reports and looks at them are 100 and 250 ms apart
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
