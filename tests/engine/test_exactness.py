"""Greedy tokens and logprobs equal transformers' own, however the work is cut and mixed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.engine.conftest import on_backends

NATIVE = [
    "llama",
    "llama-biases-tied",
    "llama-wide-heads",
    "llama-narrow-heads",
    "mistral",
    "mistral-window",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "opt",
    "opt-post-norm-projected",
    "rope-linear",
    "rope-dynamic",
    "rope-llama3",
    "rope-yarn",
    "rope-longrope",
]
LIMIT = 128


def prompts(*lengths: int) -> list[list[int]]:
    """Random prompts of these lengths."""
    chooser = random.Random(11)
    return [[chooser.randrange(3, 199) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize(("name", "backend"), on_backends(*NATIVE))
def test_greedy_tokens_of_a_mixed_batch_equal_transformers(
    name: str, backend: str, tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    model = tiny(name)
    driver = drive(model.path, budget=37, attention_backend=backend)
    assert driver.executor.capacity.max_context == LIMIT
    sequences = [
        driver.add(prompt, min(20, LIMIT - len(prompt)))
        for prompt in prompts(1, 2, 16, 17, 30, 75, LIMIT - 1)
    ]
    driver.run()
    seen: set[int] = set()
    for sequence in sequences:
        output = sequence.tokens[sequence.prompt_length :]
        model.assert_generates(sequence.request.prompt_ids, output)
        seen.update(output)
    assert len(seen) > 20  # a model that repeats itself would prove little


@pytest.mark.parametrize(
    ("name", "backend"), on_backends("llama", "mistral-window", "rope-dynamic", "opt")
)
@pytest.mark.parametrize(("block_size", "budget"), [(1, 5), (16, 1), (16, 13), (64, 512)])
def test_block_size_and_budget_change_no_token(
    name: str,
    backend: str,
    block_size: int,
    budget: int,
    tiny: Callable[..., Any],
    drive: Callable[..., Any],
) -> None:
    model = tiny(name)
    driver = drive(model.path, budget=budget, block_size=block_size, attention_backend=backend)
    sequences = [driver.add(prompt, 12) for prompt in prompts(1, 33, 50)]
    driver.run()
    for sequence in sequences:
        model.assert_generates(
            sequence.request.prompt_ids, sequence.tokens[sequence.prompt_length :]
        )


@pytest.mark.parametrize(
    ("name", "backend"), on_backends("llama", "mistral-window", "rope-dynamic", "opt")
)
def test_preempted_sequences_go_on_as_if_nothing_happened(
    name: str, backend: str, tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    model = tiny(name)
    driver = drive(model.path, budget=11, attention_backend=backend)
    sequences = [driver.add(prompt, 24) for prompt in prompts(9, 28, 40)]
    for turn in range(60):
        driver.step()
        victim = sequences[turn % 3]
        if turn % 17 == 5 and victim.finish is None:
            driver.preempt(victim)
    driver.run()
    for sequence in sequences:
        model.assert_generates(
            sequence.request.prompt_ids, sequence.tokens[sequence.prompt_length :]
        )


@pytest.mark.parametrize(
    ("name", "backend"), on_backends("llama", "mistral-window", "rope-dynamic", "opt")
)
def test_a_long_generation_stays_equal_up_to_the_context_limit(
    name: str, backend: str, tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    model = tiny(name)
    driver = drive(model.path, attention_backend=backend)
    sequence = driver.add(prompts(3)[0], LIMIT - 3)
    driver.run()
    model.assert_generates(sequence.request.prompt_ids, sequence.tokens[3:])


@pytest.mark.parametrize(("name", "backend"), on_backends("llama", "qwen2-window", "opt"))
def test_prompt_and_output_logprobs_are_those_of_transformers(
    name: str, backend: str, tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    model = tiny(name)
    driver = drive(model.path, budget=7, attention_backend=backend)
    (prompt, other) = prompts(23, 9)
    sequence = driver.add(prompt, 6, logprobs=3, prompt_logprobs=2)
    driver.add(other, 6)
    driver.run()
    with torch.inference_mode():
        logits = model.reference(torch.tensor([sequence.tokens])).logits[0]
    expected = logits.log_softmax(-1)
    found = [
        logprob
        for plan, result in driver.results
        for chunk, sampled, prompted in zip(
            plan.chunks, result.sampled, result.prompt_logprobs, strict=True
        )
        if chunk.sequence is sequence
        for logprob in (*prompted, *([sampled.logprob] if sampled else []))
    ]
    assert [logprob.token_id for logprob in found] == sequence.tokens[1:]
    for position, logprob in enumerate(found):
        token = sequence.tokens[position + 1]
        assert logprob.logprob == pytest.approx(expected[position, token].item(), abs=1e-4)
        alternatives = 2 if position + 1 < len(prompt) else 3
        best = expected[position].topk(alternatives)
        assert [t for t, _ in logprob.top[:alternatives]] == best.indices.tolist()
        assert [p for _, p in logprob.top[:alternatives]] == pytest.approx(
            best.values.tolist(), abs=1e-4
        )


def test_requests_without_logprobs_get_none(
    tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    driver = drive(tiny("llama").path, budget=7)
    driver.add(prompts(23)[0], 3)
    driver.run()
    for _, result in driver.results:
        assert result.prompt_logprobs == ((),)
        assert all(s is None or s.logprob is None for s in result.sampled)
