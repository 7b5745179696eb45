from __future__ import annotations

import contextlib
import math

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.config import GatewayConfig
from baton.errors import BatonError, InvalidRequest, NotFound, Unsupported
from baton.v1.generation_pb2 import GenerateRequest
from gateway.model_files import load_facts
from gateway.prompt import PromptEncoder
from gateway.tokenizer import Tokenizer
from gateway.validation import Validator

CONTEXT = 64


@pytest.fixture(scope="module")
def validator(model_directory) -> Validator:
    config = GatewayConfig(max_prompt_bytes=5000, default_max_tokens=16)
    prompts = PromptEncoder(Tokenizer.load(model_directory), config.max_prompt_bytes)
    return Validator(load_facts(model_directory, "tiny"), prompts, config, lambda: CONTEXT)


def request(**fields) -> GenerateRequest:
    if not {"prompt", "token_ids", "chat"} & set(fields):
        fields["prompt"] = "hello"
    return GenerateRequest(**fields)


async def bad_fields(validator: Validator, message: GenerateRequest) -> list[str]:
    with pytest.raises(InvalidRequest) as caught:
        await validator.validate(message, 0.0)
    return [violation.field for violation in caught.value.violations]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 5001}, "prompt"),
        ({"prompt": "é" * 2501}, "prompt"),
        ({"prompt": "a b c " * 40}, "prompt"),
        ({"token_ids": {"ids": []}}, "token_ids.ids"),
        ({"token_ids": {"ids": [1, 400]}}, "token_ids.ids"),
        ({"token_ids": {"ids": [2**32 - 1]}}, "token_ids.ids"),
        ({"token_ids": {"ids": [1] * CONTEXT}}, "token_ids.ids"),
        ({"chat": {}}, "chat.messages"),
        ({"chat": {"messages": [{"role": "root", "content": "x"}]}}, "chat.messages[0].role"),
        ({"chat": {"messages": [{"role": "tool", "content": "x"}]}}, "chat"),
        ({"chat": {"messages": [{"role": "user", "content": "x" * 5001}]}}, "chat.messages"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"sampling": {"n": 0}}, "sampling.n"),
        ({"sampling": {"n": 17}}, "sampling.n"),
        ({"sampling": {"temperature": math.nan}}, "sampling.temperature"),
        ({"sampling": {"temperature": -0.1}}, "sampling.temperature"),
        ({"sampling": {"temperature": math.inf}}, "sampling.temperature"),
        ({"sampling": {"top_p": 0.0}}, "sampling.top_p"),
        ({"sampling": {"top_p": 1.1}}, "sampling.top_p"),
        ({"sampling": {"min_p": -1.0}}, "sampling.min_p"),
        ({"sampling": {"presence_penalty": 2.5}}, "sampling.presence_penalty"),
        ({"sampling": {"frequency_penalty": math.nan}}, "sampling.frequency_penalty"),
        ({"sampling": {"repetition_penalty": 0.0}}, "sampling.repetition_penalty"),
        ({"sampling": {"logit_bias": {400: 1.0}}}, "sampling.logit_bias"),
        ({"sampling": {"logit_bias": {5: math.nan}}}, "sampling.logit_bias[5]"),
        ({"sampling": {"allowed_token_ids": [1, 999]}}, "sampling.allowed_token_ids"),
        ({"sampling": {"allowed_token_ids": [1] * 401}}, "sampling.allowed_token_ids"),
        ({"stopping": {"max_tokens": 0}}, "stopping.max_tokens"),
        ({"stopping": {"max_tokens": 2, "min_tokens": 3}}, "stopping.min_tokens"),
        ({"stopping": {"stop": ["x"] * 17}}, "stopping.stop"),
        ({"stopping": {"stop": [""]}}, "stopping.stop[0]"),
        ({"stopping": {"stop": ["ok", "x" * 1025]}}, "stopping.stop[1]"),
        ({"stopping": {"stop_token_ids": [400]}}, "stopping.stop_token_ids"),
        ({"stopping": {"stop_token_ids": [1] * 257}}, "stopping.stop_token_ids"),
        ({"stopping": {"time_limit": Duration(seconds=-1)}}, "stopping.time_limit"),
        ({"stopping": {"time_limit": Duration(seconds=601)}}, "stopping.time_limit"),
        ({"queue_timeout": Duration()}, "queue_timeout"),
        ({"resume_window": Duration(seconds=3601)}, "resume_window"),
        ({"response": {"logprobs": 21}}, "response.logprobs"),
        ({"response": {"prompt_logprobs": 21}}, "response.prompt_logprobs"),
        ({"response": {"stream_interval": 0}}, "response.stream_interval"),
        ({"request_id": "white space"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"priority": 1001}, "priority"),
        ({"user": "x" * 129}, "user"),
        ({"labels": {str(i): "" for i in range(65)}}, "labels"),
    ],
)
async def test_each_bad_field_is_named(validator, fields, path):
    assert await bad_fields(validator, request(**fields)) == [path]


async def test_no_input_at_all_is_refused(validator):
    assert await bad_fields(validator, GenerateRequest()) == ["input"]


async def test_all_bad_fields_are_named_at_once(validator):
    message = request(
        prompt="",
        request_id="\n",
        sampling={"top_p": 7.0, "temperature": math.nan},
        stopping={"max_tokens": 0, "stop": [""]},
    )
    assert await bad_fields(validator, message) == [
        "request_id",
        "sampling.temperature",
        "sampling.top_p",
        "prompt",
        "stopping.max_tokens",
        "stopping.stop[0]",
    ]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "other"}, NotFound),
        ({"adapter": "lora"}, NotFound),
        ({"structured_output": {"regex": "a*"}}, Unsupported),
        ({"structured_output": {}}, Unsupported),
    ],
)
async def test_what_this_server_does_not_have_is_said(validator, fields, error):
    with pytest.raises(error):
        await validator.validate(request(**fields), 0.0)


async def test_unset_parameters_take_the_models_defaults(validator, model_directory):
    job = await validator.validate(request(model="tiny"), 5.0)
    sampling, stopping = job.request.sampling, job.request.stopping
    assert (sampling.n, sampling.temperature, sampling.repetition_penalty) == (1, 0.0, 1.1)
    assert (stopping.max_tokens, stopping.eos_token_ids) == (16, {1})
    assert list(job.request.prompt_ids) == Tokenizer.load(model_directory).encode("hello")
    assert (job.request.logprobs, job.request.arrived_at, job.time_limit) == (None, 5.0, None)
    assert job.queue_timeout == 30.0
    assert job.response.text
    assert job.response.skip_special_tokens


async def test_explicit_zeros_are_values(validator):
    job = await validator.validate(
        request(
            sampling={"repetition_penalty": 1.0, "seed": 0, "top_k": 0},
            response={"logprobs": 0, "text": False},
            stopping={"ignore_eos": True},
        ),
        0.0,
    )
    assert job.request.sampling.repetition_penalty == 1.0
    assert job.request.sampling.seed == 0
    assert job.request.logprobs == 0
    assert not job.response.text
    assert job.request.stopping.eos_token_ids == frozenset()


async def test_an_unset_seed_is_random_each_time(validator):
    seeds = {(await validator.validate(request(), 0.0)).request.sampling.seed for _ in range(8)}
    assert len(seeds) == 8


async def test_max_tokens_is_cut_to_the_context(validator):
    message = request(
        token_ids={"ids": [5] * (CONTEXT - 3)}, stopping={"max_tokens": 1000, "min_tokens": 9}
    )
    stopping = (await validator.validate(message, 0.0)).request.stopping
    assert (stopping.max_tokens, stopping.min_tokens) == (3, 3)


async def test_min_tokens_lift_the_default_of_max_tokens(validator):
    job = await validator.validate(request(stopping={"min_tokens": 30}), 0.0)
    assert (job.request.stopping.min_tokens, job.request.stopping.max_tokens) == (30, 30)


async def test_truncation_keeps_the_end_of_the_prompt(validator):
    message = request(token_ids={"ids": list(range(200))}, truncate_prompt_tokens=3)
    assert (await validator.validate(message, 0.0)).request.prompt_ids == (197, 198, 199)


async def test_duplicates_are_dropped(validator):
    message = request(sampling={"allowed_token_ids": [7, 3, 7]}, stopping={"stop": ["b", "a", "b"]})
    job = await validator.validate(message, 0.0)
    assert job.request.sampling.allowed_token_ids == (7, 3)
    assert job.stop_strings == ("b", "a")


async def test_a_chat_is_rendered_and_encoded_without_a_second_mark(validator, model_directory):
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    ids = (await validator.validate(request(chat=chat), 0.0)).request.prompt_ids
    assert Tokenizer.load(model_directory).decode(ids, skip_special_tokens=False) == (
        "<s>\n<|user|>hi<|assistant|>".replace("\n", "")
    )


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200))
async def test_any_parsable_message_gives_a_job_or_an_error_of_ours(validator, data):
    message = GenerateRequest()
    try:
        message.ParseFromString(data)
    except Exception:
        return
    with contextlib.suppress(BatonError):
        await validator.validate(message, 0.0)
