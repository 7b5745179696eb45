"""Tokens through gateway, prefill worker, hand-off and decode worker equal transformers' own."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from baton.client import Client, Ended, Started, Text
from tests.e2e.conftest import Named, Run
from tests.engine.conftest import VOCAB

LENGTHS = (1, 2, 15, 16, 17, 33, 63, 64, 90)
# Block size, token budget, KV blocks of the decode worker.
SETTINGS = {"block 1": (1, 7, 420), "block 16": (16, 13, 14), "block 64": (64, 512, 4)}
NATIVE = ["llama", "mistral-window", "qwen2", "qwen3", "opt", "rope-yarn"]
FALLBACK = ["gpt2", "gpt_neox", "gemma2", "phi3", "starcoder2", "olmo2"]


async def generate(client: Client, prompt: list[int], **options: Any) -> dict[int, list[int]]:
    """Output tokens by sequence."""
    tokens: dict[int, list[int]] = {}
    async for event in client.generate(prompt, token_ids=True, ignore_eos=True, **options):
        if isinstance(event, Text):
            tokens.setdefault(event.index, []).extend(event.message.token_ids)
    return tokens


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", [*NATIVE, *FALLBACK])
async def test_greedy_tokens_through_the_whole_path_equal_transformers(
    name: str, settings: str, run_stack: Run, named: Named
) -> None:
    model, limit = named(name)
    chooser = random.Random(name)
    block_size, budget, blocks = SETTINGS[settings]
    prompts = [
        [chooser.randrange(3, VOCAB) for _ in range(length)]
        for length in (*LENGTHS, limit - 9, limit - 1)
    ]
    async with run_stack(
        model.path,
        block_size=block_size,
        max_batch_tokens=budget,
        dtype="float32",
        decode_settings={"kv_blocks": blocks},
    ) as stack:
        async with stack.client() as client:
            outputs = await asyncio.gather(
                *(
                    generate(client, prompt, max_tokens=min(24, limit - len(prompt)))
                    for prompt in prompts
                )
            )
        await stack.quiet()
    seen: set[int] = set()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output[0]) == min(24, limit - len(prompt))
        model.assert_generates(prompt, output[0])
        seen.update(output[0])
    assert len(seen) > 10  # a model that repeats itself would prove little


@pytest.mark.parametrize("name", [*NATIVE, *FALLBACK])
async def test_preempted_sequences_go_on_as_if_nothing_had_happened(
    name: str, run_stack: Run, named: Named
) -> None:
    model, limit = named(name)
    prompts = [[10 + i + j for j in range(8)] for i in range(6)]
    new = limit - 8
    blocks = -(-limit // 4) + 6  # one of them fits, and six short ones fit at first
    async with run_stack(
        model.path,
        block_size=4,
        max_batch_tokens=16,
        dtype="float32",
        kv_blocks=blocks,
        decode_settings={"admission": "paged", "preemption": "recompute"},
    ) as stack:
        async with stack.client() as client:
            work = (generate(client, prompt, max_tokens=new) for prompt in prompts)
            outputs = await asyncio.gather(*work)
        await stack.quiet()
    assert stack.decoded("preemptions_total", kind="recompute") > 0
    model.generate_all(prompts, new)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len(output[0]) == new
        model.assert_generates(prompt, output[0])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
async def test_sequences_of_one_request_share_its_prompt_and_nothing_else(
    name: str, run_stack: Run, named: Named
) -> None:
    model, _ = named(name)
    prompt = list(range(10, 45))
    async with run_stack(model.path, block_size=4, max_batch_tokens=11, dtype="float32") as stack:
        async with stack.client() as client:
            greedy = await generate(client, prompt, n=3, max_tokens=20)
            sampled = await generate(client, prompt, n=3, max_tokens=20, temperature=1.5, seed=5)
            again = await generate(client, prompt, n=3, max_tokens=20, temperature=1.5, seed=5)
        await stack.quiet()
    for index in range(3):
        model.assert_generates(prompt, greedy[index])
    assert sampled == again
    assert len({tuple(tokens) for tokens in sampled.values()}) == 3


async def test_penalties_equal_transformers(run_stack: Run, named: Named) -> None:
    model, _ = named("llama")
    prompt = [5, 6, 7, 8] * 5
    async with run_stack(model.path, max_batch_tokens=7, dtype="float32") as stack:
        async with stack.client() as client:
            plain = await generate(client, prompt, max_tokens=40)
            ours = await generate(client, prompt, max_tokens=40, repetition_penalty=1.7)
    theirs = model.reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=40,
        do_sample=False,
        repetition_penalty=1.7,
        eos_token_id=None,
    )
    assert ours[0] == theirs[0, len(prompt) :].tolist()
    assert ours != plain


async def test_seeded_sampling_is_the_same_whatever_runs_beside_it(
    run_stack: Run, named: Named
) -> None:
    model, _ = named("qwen2")
    prompt, chooser = list(range(20, 50)), random.Random(1)
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0, "seed": 11, "top_p": 0.95}
    async with run_stack(
        model.path,
        block_size=8,
        max_batch_tokens=9,
        dtype="float32",
        decode_settings={"kv_blocks": 16},
    ) as stack:
        async with stack.client() as client:
            alone = await generate(client, prompt, **options)
            others = [
                generate(client, [chooser.randrange(3, VOCAB) for _ in range(9 * i)], max_tokens=40)
                for i in range(1, 6)
            ]
            crowded, *_ = await asyncio.gather(generate(client, prompt, **options), *others)
        await stack.quiet()
    async with run_stack(model.path, prefill=0, max_batch_tokens=64, dtype="float32") as stack:
        async with stack.client() as client:
            local = await generate(client, prompt, **options)
    assert alone == crowded == local


async def test_logprobs_of_prompt_and_output_are_those_of_transformers(
    run_stack: Run, named: Named
) -> None:
    model, _ = named("qwen3")
    prompt = list(range(40, 71))
    for workers in (0, 1):
        async with (
            run_stack(model.path, prefill=workers, max_batch_tokens=8, dtype="float32") as stack,
            stack.client() as client,
        ):
            accepted, outputs = None, []
            async for event in client.generate(
                prompt, max_tokens=12, logprobs=3, prompt_logprobs=2, ignore_eos=True
            ):
                match event:
                    case Started():
                        accepted = event.message
                    case Text():
                        outputs += event.message.logprobs
        tokens = [entry.token_id for entry in outputs]
        with torch.inference_mode():
            logits = model.reference(torch.tensor([[*prompt, *tokens]])).logits[0]
        expected = logits.log_softmax(-1)
        assert accepted is not None
        assert [entry.token_id for entry in accepted.prompt_logprobs] == prompt
        assert not accepted.prompt_logprobs[0].HasField("logprob")
        entries = [*accepted.prompt_logprobs[1:], *outputs]
        assert len(entries) == len(prompt) + 12 - 1
        for row, entry in zip(expected, entries, strict=False):
            assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
            assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
            assert entry.token == str(entry.token_id).encode()
            best = row.topk(len(entry.top))
            assert [top.token_id for top in entry.top] == best.indices.tolist()
            assert [top.logprob for top in entry.top] == pytest.approx(
                best.values.tolist(), abs=1e-4
            )
        assert {len(entry.top) for entry in outputs} == {3}


async def test_stop_tokens_eos_and_stop_strings_end_where_they_should(
    run_stack: Run, named: Named
) -> None:
    model, _ = named("llama")
    prompt = list(range(60, 80))
    expected, _gaps = model.generate(prompt, 30)
    third = expected[2]
    first_at = expected.index(third)
    async with run_stack(model.path, dtype="float32") as stack, stack.client() as client:

        async def finish(**options: Any) -> tuple[str, Ended]:
            text, ended = "", None
            async for event in client.generate(prompt, max_tokens=30, **options):
                match event:
                    case Text():
                        text += event.text
                    case Ended():
                        ended = event
            assert ended is not None
            return text, ended

        _, by_token = await finish(stop_token_ids=[third], ignore_eos=True)
        assert (by_token.reason, by_token.completion_tokens) == ("stop", first_at + 1)
        assert by_token.message.stop_token_id == third
        text, by_string = await finish(stop=[str(third)], ignore_eos=True)
        assert by_string.reason == "stop"
        assert by_string.message.stop == str(third)
        assert str(third) not in text
        _, late = await finish(stop_token_ids=[third], ignore_eos=True, min_tokens=10)
        assert late.completion_tokens >= 10
