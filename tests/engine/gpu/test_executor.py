"""Passes that begin before they are planned give what planned ones give."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from baton.types import Sampling
from engine.gpu.executor import GpuExecutor
from tests.engine.conftest import one_layer

Make = Callable[..., Any]


def prompt(length: int, seed: int = 1) -> list[int]:
    """A random prompt."""
    chooser = random.Random(seed)
    return [chooser.randrange(3, 67) for _ in range(length)]


@pytest.fixture(scope="module")
def small(save: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that the interpreter gets through."""
    return save(one_layer(67), tmp_path_factory.mktemp("small"))


@pytest.fixture
def on_gpu(drive: Make, device: Any) -> Make:
    """A driver over the fused kernels, in float32."""

    def make(path: Any, **options: Any) -> Any:
        options = {"attention_backend": "triton", "device": str(device), "block_size": 16} | options
        driver = drive(path, max_batch_sequences=8, kv_blocks=24, **options)
        assert isinstance(driver.executor, GpuExecutor)
        return driver

    return make


def test_a_batch_that_goes_on_is_begun_before_it_is_planned(small: Any, on_gpu: Make) -> None:
    driver = on_gpu(small.path)
    texts = [prompt(5), prompt(9, 2), prompt(3, 3)]
    sequences = [driver.add(text, 4) for text in texts]
    driver.run()
    for text, sequence in zip(texts, sequences, strict=True):
        small.assert_generates(text, sequence.tokens[len(text) :])
    assert driver.executor.taken == 3 * 3  # all but the first tokens
    assert driver.executor.wasted == 0


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_weights_are_quantized_at_load(quantization: str, small: Any, on_gpu: Make) -> None:
    driver = on_gpu(small.path, quantization=quantization)
    sequence = driver.add(prompt(5), 2)
    driver.run()
    assert driver.executor.weight_dtype == quantization
    assert len(sequence.tokens) == 7


def test_a_sequence_without_the_block_for_its_next_token_is_not_foreseen(
    small: Any, on_gpu: Make
) -> None:
    driver = on_gpu(small.path, block_size=4)
    sequence = driver.add(prompt(6), 5)
    driver.run()
    small.assert_generates(prompt(6), sequence.tokens[6:])
    assert driver.executor.taken == 3  # the simple scheduler allocates no block ahead: not for 8


def test_what_nobody_foresaw_is_computed_beside_what_somebody_did(small: Any, on_gpu: Make) -> None:
    driver = on_gpu(small.path)
    texts = [prompt(6), prompt(13, 2)]
    sequences = [driver.add(texts[0], 5)]
    for _ in range(2):
        driver.step()
    taken = driver.executor.taken
    sequences.append(driver.add(texts[1], 3))
    driver.step()
    plan, result = driver.results[-1]
    assert [chunk.length for chunk in plan.chunks] == [1, 13]
    assert driver.executor.taken == taken + 1
    assert None not in result.sampled
    driver.run()
    for text, sequence in zip(texts, sequences, strict=True):
        small.assert_generates(text, sequence.tokens[len(text) :])


def test_a_guess_for_a_sequence_that_has_gone_harms_nobody(small: Any, on_gpu: Make) -> None:
    driver = on_gpu(small.path)
    gone, stays = driver.add(prompt(5), 20), driver.add(prompt(9, 2), 5)
    for _ in range(2):
        driver.step()
    driver.running.remove(gone)  # aborted, and its blocks are somebody else's at once
    driver.free += gone.blocks
    heir = driver.add(prompt(7, 3), 3)
    driver.run()
    assert driver.executor.wasted >= 1
    small.assert_generates(prompt(9, 2), stays.tokens[9:])
    small.assert_generates(prompt(7, 3), heir.tokens[7:])


def test_a_guess_is_not_taken_for_a_sequence_that_was_preempted(small: Any, on_gpu: Make) -> None:
    driver = on_gpu(small.path)
    text = prompt(5)
    sequence = driver.add(text, 5)
    for _ in range(2):
        driver.step()
        driver.preempt(sequence)
    driver.run()
    small.assert_generates(text, sequence.tokens[len(text) :])


def test_seeded_sequences_draw_what_they_draw_in_torch(
    small: Any, on_gpu: Make, drive: Make
) -> None:
    path = small.path
    samplings = [
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.7, top_k=20, seed=4),
        Sampling(temperature=1.3, top_p=0.8, seed=5),
        Sampling(temperature=0.9, min_p=0.05, seed=6),
        Sampling(),
    ]

    def outputs(driver: Any) -> list[list[int]]:
        sequences = [driver.add(prompt(6, i), 3, sampling=s) for i, s in enumerate(samplings)]
        driver.run()
        return [sequence.tokens for sequence in sequences]

    ours = on_gpu(path)
    assert outputs(ours) == outputs(drive(path, attention_backend="torch"))
    assert ours.executor.taken > 0


def test_logprobs_penalties_and_prompt_logprobs_are_those_of_torch(
    small: Any, on_gpu: Make, drive: Make
) -> None:
    path = small.path

    def results(driver: Any) -> list[Any]:
        driver.add(prompt(6), 2, logprobs=2)
        driver.add(prompt(5, 2), 2, sampling=Sampling(repetition_penalty=1.5))
        driver.add(prompt(4, 3), 2, prompt_logprobs=1)
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
    ["llama-biases-tied", "llama-wide-heads", "mistral-window", "qwen3", "rope-dynamic"],
)
def test_every_family_generates_what_transformers_does(name: str, tiny: Make, on_gpu: Make) -> None:
    model, text = tiny(name), prompt(23)
    driver = on_gpu(model.path, budget=20)
    sequence = driver.add(text, 3)
    driver.run()
    model.assert_generates(text, sequence.tokens[len(text) :])
