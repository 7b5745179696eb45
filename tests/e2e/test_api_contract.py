"""The public API does what the comments of its protos say, field by field."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import torch
from grpc_status import rpc_status
from transformers import AutoTokenizer

import demo_model
from baton import wire
from baton.client import Client, Ended, Event, Started, Text, Totals
from baton.errors import AlreadyExists, InvalidRequest, NotFound, Overloaded
from baton.v1 import generation_pb2, model_pb2
from baton.v1.model_pb2_grpc import AdminServiceStub, ModelServiceStub
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
    theirs, chooser = AutoTokenizer.from_pretrained(DEMO), random.Random(0)
    options: dict[str, Any] = {
        "allowed_token_ids": sorted(set(theirs(UNICODE)["input_ids"])),
        "temperature": 50.0,
        "max_tokens": 60,
    }
    async with run_stack(DEMO) as stack, stack.client() as client:
        for seed in range(6):
            whole = await ask(client, UNICODE, seed=seed, **options)
            ids, text = whole.ids[0], whole.texts[0]
            assert text == theirs.decode(ids, skip_special_tokens=True)
            special = await ask(client, UNICODE, seed=seed, skip_special_tokens=False, **options)
            assert special.texts == [theirs.decode(ids)]
            for include in (False, True):
                start = chooser.randrange(len(text) - 4)
                stop = text[start : start + chooser.randrange(1, 5)]
                if "\ufffd" in stop:  # a character that only its other half would make
                    continue
                cut = await ask(
                    client,
                    UNICODE,
                    seed=seed,
                    stop=["never", stop],
                    include_stop=include,
                    **options,
                )
                shown = text.index(stop) + (len(stop) if include else 0)
                count = next(
                    i for i in range(61) if stop in theirs.decode(ids[:i], skip_special_tokens=True)
                )
                assert cut.texts == [text[:shown]]
                assert (cut.ended[0].stop, cut.ended[0].completion_tokens) == (stop, count)
                assert cut.ids == [ids[:count]]


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
        prefilling = await ask(client, [5] * 900, prompt_logprobs=0, **limit)
        await asyncio.gather(*(server.stop(0) for server in (*stack.prefill, *stack.decode)))
        waiting = await ask(client, [5], **limit)
    for answer in (decoding, prefilling, waiting):
        for ended in answer.ended:
            assert ended.reason == generation_pb2.FINISH_REASON_TIME_LIMIT
            assert bool(ended.completion_tokens) is (answer is decoding)


# -- Sampling ----------------------------------------------------------------------------------


async def test_seeds_are_echoed_and_repeatable(client: Client) -> None:
    for seed in (0, 1, 2**64 - 1):
        one, two = [await ask(client, seed=seed, temperature=1.0) for _ in range(2)]
        assert one.ids == two.ids
        assert one.ended[0].seed == seed
    unset = [await ask(client, temperature=1.0) for _ in range(3)]
    assert len({answer.ended[0].seed for answer in unset}) == 3
    again = await ask(client, temperature=1.0, seed=unset[0].ended[0].seed)
    assert again.ids == unset[0].ids


async def test_sequences_are_different_and_end_each_for_itself(client: Client) -> None:
    options: dict[str, Any] = {"n": 16, "seed": 3, "temperature": 1.0}
    plain = await ask(client, **options)
    assert len({tuple(ids) for ids in plain.ids}) == 16
    stop = str(plain.ids[5][4])
    cut = await ask(client, stop=[stop], **options)
    early = 0
    for ids, whole, ended in zip(cut.ids, plain.ids, cut.ended, strict=True):
        hits = (i + 1 for i in range(20) if stop in " ".join(map(str, whole[: i + 1])))
        count = next(hits, 20)
        early += count < 20
        assert (ids, ended.completion_tokens) == (whole[:count], count)
    assert 0 < early < 16
    assert cut.usage.completion_tokens == sum(map(len, cut.ids))
    assert cut.usage.total_tokens == cut.usage.completion_tokens + len(PROMPT)


EXTREMES: dict[str, dict[str, Any]] = {
    "top_k 1": {"top_k": 1},
    "tiny top_p": {"top_p": 1e-6},
    "min_p 1": {"min_p": 1.0},
    "tiny temperature": {"temperature": 1e-30},
    "no temperature": {"temperature": 0.0, "top_k": 3},
}


@pytest.mark.parametrize("case", EXTREMES)
async def test_every_way_to_keep_one_token_is_greedy(
    client: Client, model: TinyModel, case: str
) -> None:
    answer = await ask(client, **{"temperature": 1.0} | EXTREMES[case])
    model.assert_generates(PROMPT, answer.ids[0])


async def test_bias_and_allowed_tokens_rule_what_comes(client: Client) -> None:
    plain = (await ask(client)).ids[0]
    assert (await ask(client, logit_bias={77: 100.0})).ids == [[77] * 20]
    assert plain[0] not in (await ask(client, logit_bias={plain[0]: -100.0})).ids[0]
    assert (await ask(client, allowed_token_ids=[77])).ids == [[77] * 20]
    hot = await ask(client, allowed_token_ids=[7, 8, 2], temperature=100.0, max_tokens=60)
    assert set(hot.ids[0]) == {7, 8, 2}
    ended = await ask(client, allowed_token_ids=[7, 2], logit_bias={2: 100}, ignore_eos=False)
    assert (ended.ids, ended.ended[0].eos_token_id) == ([[2]], 2)


async def test_penalties_are_those_of_the_formulas(client: Client, model: TinyModel) -> None:
    """Presence and frequency as OpenAI defines them, repetition as Keskar et al. 2019."""
    for presence, frequency, repetition in ((1.5, 0, 1), (0, 0.8, 1), (-1, 0.5, 1.2)):
        answer = await ask(
            client,
            presence_penalty=presence,
            frequency_penalty=frequency,
            repetition_penalty=repetition,
            logit_bias={7: 2.5},
        )
        output = answer.ids[0]
        with torch.inference_mode():
            logits = model.reference(torch.tensor([PROMPT + output])).logits[0].double()
        for i, token in enumerate(output):
            scores = logits[len(PROMPT) - 1 + i].clone()
            for seen in {*PROMPT, *output[:i]}:
                scores[seen] *= repetition if scores[seen] < 0 else 1 / repetition
            for seen in set(output[:i]):
                scores[seen] -= presence + frequency * output[:i].count(seen)
            scores[7] += 2.5
            assert scores[token] >= scores.max() - 1e-4


async def test_logprobs_of_every_sequence_are_those_of_transformers(
    client: Client, model: TinyModel
) -> None:
    for count in (0, 2):
        answer = await ask(client, n=3, logprobs=count, temperature=1.5, seed=1, top_k=20)
        for index in range(3):
            ids, entries = answer.ids[index], answer.logprobs(index)
            assert [entry.token_id for entry in entries] == ids
            with torch.inference_mode():
                logits = model.reference(torch.tensor([PROMPT + ids])).logits[0]
            rows = logits.log_softmax(-1)[len(PROMPT) - 1 :]
            for row, entry in zip(rows, entries, strict=False):
                assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
                assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
                assert [top.token_id for top in entry.top] == row.topk(count).indices.tolist()


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
    assert [name.partition("-")[0] for name in order] == ["hog"] + ["high"] * 3 + ["low"] * 4


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
