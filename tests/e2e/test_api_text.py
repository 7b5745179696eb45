"""Text and stops are exact: every character and every token is there once, or it is cut."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from transformers import AutoTokenizer

from baton.client import Client
from baton.errors import InvalidRequest
from baton.v1 import generation_pb2, model_pb2
from baton.v1.model_pb2_grpc import ModelServiceStub
from tests.e2e.answers import DEMO, PROMPT, ask
from tests.e2e.conftest import Run, Stack
from tests.engine.conftest import TinyModel

pytestmark = pytest.mark.asyncio(loop_scope="module")

# -- Text --------------------------------------------------------------------------------------


UNICODE = "Hello 🙂 world, 敏捷的棕色狐狸 👩‍👩‍👧 naïve café — done"


async def test_the_tokenizer_calls_equal_transformers(run_stack: Run) -> None:
    theirs, chooser = AutoTokenizer.from_pretrained(DEMO), random.Random(3)
    chat = [{"role": "system", "content": "é"}, {"role": "user", "content": UNICODE}]
    async with run_stack(DEMO) as stack, stack.client() as client:
        models = ModelServiceStub(client.channel)
        got = await models.Tokenize(model_pb2.TokenizeRequest(text=UNICODE))
        assert list(got.token_ids) == theirs(UNICODE)["input_ids"]
        for prompted in (True, False):
            request = model_pb2.TokenizeRequest(
                chat={"messages": chat, "add_generation_prompt": prompted}
            )
            rendered = theirs.apply_chat_template(chat, add_generation_prompt=prompted)
            ids = list((await models.Tokenize(request)).token_ids)
            assert ids == rendered["input_ids"]
            message = generation_pb2.GenerateRequest(
                chat=request.chat,
                truncate_prompt_tokens=5,
                stopping={"max_tokens": 1},
                response={"prompt_logprobs": 0},
            )
            (first, *_) = [r async for r in client.generation.Generate(message)]
            assert [entry.token_id for entry in first.accepted.prompt_logprobs] == ids[-5:]
        for _ in range(10):
            ids = [chooser.randrange(len(theirs)) for _ in range(40)]
            back = await models.Detokenize(model_pb2.DetokenizeRequest(token_ids=ids))
            assert back.text == theirs.decode(ids)


async def test_text_and_stop_strings_are_exact_for_any_characters(run_stack: Run) -> None:
    """Random tokens out of which emoji and CJK characters come whole, in parts and broken."""
    theirs = AutoTokenizer.from_pretrained(DEMO)
    options: dict[str, Any] = {
        "allowed_token_ids": sorted(set(theirs(UNICODE)["input_ids"])),
        "temperature": 50.0,
        "max_tokens": 60,
    }

    async def check(client: Client, seed: int) -> None:
        chooser = random.Random(seed)
        whole, special = await asyncio.gather(
            ask(client, UNICODE, seed=seed, **options),
            ask(client, UNICODE, seed=seed, skip_special_tokens=False, **options),
        )
        ids, text = whole.ids[0], whole.texts[0]
        assert text == theirs.decode(ids, skip_special_tokens=True)
        assert special.texts == [theirs.decode(ids)]
        for include in (False, True):
            start = chooser.randrange(len(text) - 4)
            stop = text[start : start + chooser.randrange(1, 5)]
            if "\ufffd" in stop:  # a character that only its other half would make
                continue
            stopping = {"stop": ["never", stop], "include_stop": include}
            cut = await ask(client, UNICODE, seed=seed, **stopping, **options)
            shown = text.index(stop) + (len(stop) if include else 0)
            count = next(
                i for i in range(61) if stop in theirs.decode(ids[:i], skip_special_tokens=True)
            )
            assert cut.texts == [text[:shown]]
            assert (cut.ended[0].stop, cut.ended[0].completion_tokens) == (stop, count)
            assert cut.ids == [ids[:count]]

    # float32: bfloat16 rounds otherwise in another batch, and the seeds are asked in one
    async with run_stack(DEMO, dtype="float32") as stack, stack.client() as client:
        await asyncio.gather(*(check(client, seed) for seed in range(6)))


async def test_the_text_of_an_end_of_sequence_token_is_shown_on_demand(run_stack: Run) -> None:
    end = AutoTokenizer.from_pretrained(DEMO).eos_token
    async with run_stack(DEMO) as stack, stack.client() as client:
        for include in (False, True):
            for skip in (False, True):
                answer = await ask(
                    client,
                    "x",
                    allowed_token_ids=[2],
                    ignore_eos=False,
                    include_stop=include,
                    skip_special_tokens=skip,
                )
                assert answer.texts == [end if include and not skip else ""]
                assert answer.ids == [[2]]
                assert answer.ended[0].eos_token_id == 2


async def test_without_text_tokens_come_and_stop_strings_work(
    client: Client, model: TinyModel
) -> None:
    tokens, _ = model.generate(PROMPT, 20)
    message = generation_pb2.GenerateRequest(
        token_ids={"ids": PROMPT},
        stopping={"max_tokens": 20, "stop": [str(tokens[3])], "ignore_eos": True},
        response={"text": False, "token_ids": True},
    )
    responses = [r async for r in client.generation.Generate(message)]
    deltas = [r.delta for r in responses if r.HasField("delta")]
    count = tokens.index(tokens[3]) + 1
    assert [t for delta in deltas for t in delta.token_ids] == tokens[:count]
    assert not any(delta.text for delta in deltas)
    assert all(delta.token_count for delta in deltas)
    assert responses[-2].finished.stop == str(tokens[3])


# -- Stopping ----------------------------------------------------------------------------------


async def test_the_first_token_may_end_the_sequence(
    stack: Stack, client: Client, model: TinyModel
) -> None:
    (token, *_), _ = model.generate(PROMPT, 1)
    for include in (False, True):
        shown = [f" {token}" if include else ""]
        by_string = await ask(client, stop=[f" {token}"], include_stop=include)
        assert (by_string.texts, by_string.ended[0].stop) == (shown, f" {token}")
        by_token = await ask(client, stop_token_ids=[token], include_stop=include)
        assert (by_token.texts, by_token.ended[0].stop_token_id) == (shown, token)
        for answer in (by_string, by_token):
            assert answer.ids == [[token]]
            assert answer.ended[0].reason == generation_pb2.FINISH_REASON_STOP
    by_length = await ask(client, max_tokens=1)
    assert by_length.ended[0].reason == generation_pb2.FINISH_REASON_LENGTH
    assert by_length.ended[0].WhichOneof("matched") is None
    await stack.quiet()


async def test_stops_count_only_after_min_tokens(client: Client) -> None:
    for options in ({"stop": ["42"]}, {"stop_token_ids": [42]}, {"logit_bias": {42: 100.0}}):
        only = {"allowed_token_ids": [42]} if "logit_bias" not in options else {}
        answer = await ask(client, min_tokens=5, **options, **only)
        assert answer.ids[0] == [42] * len(answer.ids[0])
        assert len(answer.ids[0]) == (20 if "logit_bias" in options else 6)


async def test_the_context_ends_where_it_is_said_to(run_stack: Run, model: TinyModel) -> None:
    async with run_stack(model.path, max_context=64) as stack, stack.client() as client:
        (listed,) = await client.list_models()
        assert listed.max_context_tokens == 64
        for options in ({}, {"max_tokens": 1000}, {"min_tokens": 500, "max_tokens": 1000}):
            answer = await ask(client, [5] * 63, **options)
            assert len(answer.ids[0]) == 1
            assert answer.ended[0].reason == generation_pb2.FINISH_REASON_LENGTH
        for length in (64, 65):
            with pytest.raises(InvalidRequest, match="63"):
                await ask(client, [5] * length)
            answer = await ask(client, [5] * length, truncate_prompt_tokens=63)
            assert answer.usage.prompt_tokens == 63


async def test_the_context_is_no_longer_than_the_kv_memory(
    run_stack: Run, model: TinyModel
) -> None:
    async with (
        run_stack(model.path, kv_blocks=4, block_size=16) as stack,
        stack.client() as client,
    ):
        (listed,) = await client.list_models()
        assert listed.max_context_tokens == 65
        for length in (1, 10, 64):
            answer = await ask(client, [5] * length, max_tokens=1000)
            assert len(answer.ids[0]) == 65 - length
            assert answer.ended[0].reason == generation_pb2.FINISH_REASON_LENGTH
        several = await ask(client, [5] * 10, n=3, max_tokens=1000)
        assert [len(ids) for ids in several.ids] == [55] * 3


@pytest.mark.parametrize("prefill", [0, 1])
async def test_a_time_limit_ends_what_waits_what_prefills_and_what_decodes(
    run_stack: Run, model: TinyModel, prefill: int
) -> None:
    limit = {"time_limit": {"nanos": 150_000_000}, "max_tokens": 3000}
    async with (
        run_stack(model.path, prefill=prefill, max_batch_tokens=4, dtype="float32") as stack,
        stack.client() as client,
    ):
        decoding = await ask(client, [5], n=2, **limit)
        prefilling = await ask(client, [5] * 3500, prompt_logprobs=0, **limit)
        await asyncio.gather(*(server.stop(0) for server in (*stack.prefill, *stack.decode)))
        waiting = await ask(client, [5], **limit)
    for answer in (decoding, prefilling, waiting):
        for ended in answer.ended:
            assert ended.reason == generation_pb2.FINISH_REASON_TIME_LIMIT
            assert bool(ended.completion_tokens) is (answer is decoding)
