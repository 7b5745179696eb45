"""Passes that begin before they are planned give what planned ones give."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from baton.types import Sampling
from engine.gpu.executor import GpuExecutor

Make = Callable[..., Any]


def prompt(length: int, seed: int = 1) -> list[int]:
    """A random prompt."""
    chooser = random.Random(seed)
    return [chooser.randrange(3, 199) for _ in range(length)]


@pytest.fixture
def on_gpu(drive: Make, device: Any) -> Make:
    """A driver over the fused kernels, in float32."""

    def make(path: Any, **options: Any) -> Any:
        options = {"attention_backend": "triton", "device": str(device), "block_size": 4} | options
        driver = drive(path, max_batch_sequences=8, **options)
        assert isinstance(driver.executor, GpuExecutor)
        return driver

    return make


def test_a_batch_that_goes_on_is_begun_before_it_is_planned(tiny: Make, on_gpu: Make) -> None:
    model, driver = tiny("llama"), on_gpu(tiny("llama").path)
    texts = [prompt(5), prompt(9, 2), prompt(3, 3)]
    sequences = [driver.add(text, 8) for text in texts]
    driver.run()
    for text, sequence in zip(texts, sequences, strict=True):
        model.assert_generates(text, sequence.tokens[len(text) :])
    # 3 times 7 tokens follow a first one. The simple scheduler allocates no block ahead, so those
    # that begin one are not foreseen.
    begin_blocks = sum(
        position % 4 == 0 for text in texts for position in range(len(text), len(text) + 7)
    )
    assert 0 < driver.executor.taken <= 21 - begin_blocks
    assert driver.executor.wasted == 0


def test_what_nobody_foresaw_is_computed_beside_what_somebody_did(tiny: Make, on_gpu: Make) -> None:
    model, driver = tiny("llama"), on_gpu(tiny("llama").path)
    texts = [prompt(6), prompt(13, 2)]
    sequences = [driver.add(texts[0], 9)]
    for _ in range(3):
        driver.step()
    taken = driver.executor.taken
    sequences.append(driver.add(texts[1], 5))
    driver.step()
    plan, result = driver.results[-1]
    assert [chunk.length for chunk in plan.chunks] == [1, 13]
    assert driver.executor.taken == taken + 1
    assert None not in result.sampled
    driver.run()
    for text, sequence in zip(texts, sequences, strict=True):
        model.assert_generates(text, sequence.tokens[len(text) :])


def test_a_guess_for_a_sequence_that_has_gone_harms_nobody(tiny: Make, on_gpu: Make) -> None:
    model, driver = tiny("llama"), on_gpu(tiny("llama").path)
    gone, stays = driver.add(prompt(5), 20), driver.add(prompt(9, 2), 9)
    for _ in range(3):
        driver.step()
    driver.running.remove(gone)  # aborted, and its blocks are somebody else's at once
    driver.free += gone.blocks
    heir = driver.add(prompt(7, 3), 6)
    driver.run()
    assert driver.executor.wasted >= 1
    model.assert_generates(prompt(9, 2), stays.tokens[9:])
    model.assert_generates(prompt(7, 3), heir.tokens[7:])


def test_a_guess_is_not_taken_for_a_sequence_that_was_preempted(tiny: Make, on_gpu: Make) -> None:
    model, driver = tiny("llama"), on_gpu(tiny("llama").path)
    text = prompt(5)
    sequence = driver.add(text, 9)
    for _ in range(3):
        driver.step()
        driver.preempt(sequence)
    driver.run()
    model.assert_generates(text, sequence.tokens[len(text) :])


def test_seeded_sequences_draw_what_they_draw_in_torch(
    tiny: Make, on_gpu: Make, drive: Make
) -> None:
    path = tiny("qwen3").path
    samplings = [
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.7, top_k=20, seed=4),
        Sampling(temperature=1.3, top_p=0.8, seed=5),
        Sampling(temperature=0.9, min_p=0.05, seed=6),
        Sampling(),
    ]

    def outputs(driver: Any) -> list[list[int]]:
        sequences = [driver.add(prompt(6, i), 7, sampling=s) for i, s in enumerate(samplings)]
        driver.run()
        return [sequence.tokens for sequence in sequences]

    ours = on_gpu(path)
    assert outputs(ours) == outputs(drive(path, attention_backend="torch"))
    assert ours.executor.taken > 0


def test_logprobs_penalties_and_prompt_logprobs_are_those_of_torch(
    tiny: Make, on_gpu: Make, drive: Make
) -> None:
    path = tiny("qwen2").path

    def results(driver: Any) -> list[Any]:
        driver.add(prompt(6), 4, logprobs=2)
        driver.add(prompt(5, 2), 4, sampling=Sampling(repetition_penalty=1.5))
        driver.add(prompt(4, 3), 4, prompt_logprobs=1)
        driver.run()
        return [result for _, result in driver.results]

    for ours, theirs in zip(
        results(on_gpu(path)), results(drive(path, attention_backend="torch")), strict=True
    ):
        for one, other in zip(ours.sampled, theirs.sampled, strict=True):
            assert one.token_id == other.token_id
            assert (one.logprob is None) == (other.logprob is None)
            if one.logprob is not None:
                assert one.logprob.logprob == pytest.approx(other.logprob.logprob, abs=1e-4)
        for one, other in zip(ours.prompt_logprobs, theirs.prompt_logprobs, strict=True):
            assert [p.token_id for p in one] == [p.token_id for p in other]
            assert [p.logprob for p in one] == pytest.approx([p.logprob for p in other], abs=1e-4)


@pytest.mark.parametrize(
    "name",
    ["llama-biases-tied", "llama-wide-heads", "mistral-window", "qwen2-window", "rope-dynamic"],
)
def test_every_family_generates_what_transformers_does(name: str, tiny: Make, on_gpu: Make) -> None:
    model, text = tiny(name), prompt(23)
    driver = on_gpu(model.path, budget=10)
    sequence = driver.add(text, 8)
    driver.run()
    model.assert_generates(text, sequence.tokens[len(text) :])
