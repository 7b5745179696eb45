"""Sampling through the executor: a seed means the same tokens however the work is arranged."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from baton.types import PriorOutput, Sampling
from tests.engine.conftest import on_backends

SEEDED = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.1, seed=2**63 + 5)
PROMPT = [random.Random(5).randrange(3, 199) for _ in range(29)]
TOKENS = 30


@pytest.fixture(scope="module")
def alone(tiny: Callable[..., Any]) -> Callable[[Callable[..., Any], str], list[int]]:
    """What the seeded request gives with the engine to itself."""

    def run(drive: Callable[..., Any], name: str) -> list[int]:
        driver = drive(tiny(name).path, attention_backend="torch")
        sequence = driver.add(PROMPT, TOKENS, sampling=SEEDED)
        driver.run()
        tokens: list[int] = sequence.tokens[len(PROMPT) :]
        assert len(set(tokens)) > 10
        return tokens

    return run


@pytest.mark.parametrize(("name", "backend"), on_backends("llama", "opt"))
@pytest.mark.parametrize(("budget", "block_size"), [(5, 1), (37, 16), (512, 64)])
def test_a_seeded_request_gives_the_same_tokens_in_any_batch(
    name: str,
    backend: str,
    budget: int,
    block_size: int,
    tiny: Callable[..., Any],
    drive: Callable[..., Any],
    alone: Callable[..., list[int]],
) -> None:
    expected = alone(drive, name)
    driver = drive(tiny(name).path, budget=budget, block_size=block_size, attention_backend=backend)
    others = [Sampling(), Sampling(temperature=1.5, seed=9), Sampling(temperature=1.0, top_k=3)]
    for turn, sampling in enumerate(others):
        driver.add(PROMPT[: 7 * turn + 1], 12, sampling=sampling)
    sequence = driver.add(PROMPT, TOKENS, sampling=SEEDED)
    for turn in range(400):
        if not driver.step():
            break
        if turn % 23 == 20 and sequence.finish is None:
            driver.preempt(sequence)
    assert sequence.tokens[len(PROMPT) :] == expected


@pytest.mark.parametrize(("name", "backend"), on_backends("llama"))
@pytest.mark.parametrize("done", [1, 13, TOKENS - 1])
def test_a_seeded_request_resumed_elsewhere_goes_on_as_it_would_have(
    name: str,
    backend: str,
    done: int,
    tiny: Callable[..., Any],
    drive: Callable[..., Any],
    alone: Callable[..., list[int]],
) -> None:
    expected = alone(drive, name)
    driver = drive(tiny(name).path, budget=11, attention_backend=backend)
    prior = (PriorOutput(token_ids=tuple(expected[:done])),)
    sequence = driver.add(PROMPT, TOKENS, sampling=SEEDED, prior_outputs=prior)
    driver.run()
    assert sequence.tokens[len(PROMPT) :] == expected


def test_greedy_tokens_with_a_repetition_penalty_equal_transformers(
    tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    model = tiny("llama")
    driver = drive(model.path, budget=11)
    sequence = driver.add(PROMPT, TOKENS, sampling=Sampling(repetition_penalty=1.4))
    driver.run()
    expected = model.reference.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=1.4,
    )
    assert sequence.tokens == expected[0].tolist()
    assert sequence.tokens[len(PROMPT) :] != model.generate(PROMPT, TOKENS)[0]  # it did something
