"""Passes that begin before they are planned give what planned ones give."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest

from baton.types import Logprob, Sampling
from engine.gpu.executor import GpuExecutor
from engine.gpu.model import GpuLlama
from scheduling.sequence import Sequence
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


def test_warm_up_leaves_nothing_behind(small: Any, on_gpu: Make) -> None:
    driver = on_gpu(small.path, budget=20)
    driver.executor.warm_up()
    assert not driver.executor.pool.storage.any()
    text = prompt(5)
    sequence = driver.add(text, 3, logprobs=1)
    driver.run()
    small.assert_generates(text, sequence.tokens[len(text) :])


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_weights_are_quantized_at_load(quantization: str, small: Any, on_gpu: Make) -> None:
    driver = on_gpu(small.path, quantization=quantization)
    sequence = driver.add(prompt(5), 2)
    driver.run()
    assert driver.executor.weight_dtype == quantization
    assert len(sequence.tokens) == 7


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("quantization", "kv_dtype"),
    [("none", "auto"), ("none", "fp8"), ("int8", "int8"), ("int4", "auto"), ("fp8", "fp8")],
)
def test_graphs_of_every_size_give_what_kernels_one_by_one_do(
    quantization: str, kv_dtype: str, small: Any, on_gpu: Make
) -> None:
    def run(*, graphs: bool) -> list[list[int]]:
        driver = on_gpu(small.path, quantization=quantization, kv_dtype=kv_dtype)
        if graphs:
            driver.executor.warm_up()
        sequences = [driver.add(prompt(3 + i, i), 2 + 3 * i) for i in range(7)]
        driver.run()
        assert driver.executor.taken > 0
        return [sequence.tokens for sequence in sequences]

    assert run(graphs=True) == run(graphs=False)


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


PENALTIES = Sampling(repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.4)
WANTS: list[dict[str, Any]] = [
    {"sampling": PENALTIES},
    {"sampling": replace(PENALTIES, temperature=1.0, top_p=0.9, seed=5), "logprobs": 3},
    {"sampling": Sampling(logit_bias=((9, 2.0), (30, 5.0)), allowed_token_ids=(9, 30, 31, 32))},
    {"stopping": {"min_tokens": 3, "eos_token_ids": frozenset(range(40))}},
    {"logprobs": 0},
    {"sampling": Sampling(temperature=0.8, seed=6)},
    {},
]
"""What requests may want beside the likeliest token, and two that want nothing of the kind."""


def assert_near(ours: Logprob, theirs: Logprob) -> None:
    """The same but for rounding."""
    assert (ours.token_id, ours.rank) == (theirs.token_id, theirs.rank)
    assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
    shares = [theirs.logprob, *(share for _, share in theirs.top)]
    assert [ours.logprob, *(share for _, share in ours.top)] == pytest.approx(shares, abs=1e-4)


def told(driver: Any, sequences: list[Sequence]) -> list[list[Logprob]]:
    """The log probabilities that each sequence was given with its tokens."""
    found: dict[Sequence, list[Logprob]] = {sequence: [] for sequence in sequences}
    for plan, result in driver.results:
        for chunk, sampled in zip(plan.chunks, result.sampled, strict=True):
            if sampled is not None and sampled.logprob is not None:
                found[chunk.sequence].append(sampled.logprob)
    return list(found.values())


@pytest.mark.parametrize("graphs", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_whatever_requests_want_of_their_tokens_they_are_begun_before_they_are_planned(
    graphs: bool, small: Any, on_gpu: Make, drive: Make
) -> None:
    def run(driver: Any) -> tuple[list[list[int]], list[list[Logprob]]]:
        sequences = [driver.add(prompt(5 + i, i), 4, **wants) for i, wants in enumerate(WANTS)]
        driver.run()
        return [sequence.tokens for sequence in sequences], told(driver, sequences)

    ours = on_gpu(small.path)
    if graphs:
        ours.executor.warm_up()
    tokens, logprobs = run(ours)
    wanted_tokens, wanted_logprobs = run(drive(small.path, attention_backend="torch"))
    assert tokens == wanted_tokens
    generated = [len(found) - 5 - i for i, found in enumerate(tokens)]
    assert ours.executor.taken == sum(generated) - len(WANTS)  # all but the first tokens
    assert [len(found) for found in logprobs] == [0, generated[1], 0, 0, generated[4], 0, 0]
    for one, other in zip(chain(*logprobs), chain(*wanted_logprobs), strict=True):
        assert_near(one, other)


def test_sequences_that_want_their_logits_changed_survive_wasted_guesses_and_preemption(
    small: Any, on_gpu: Make, drive: Make
) -> None:
    def run(driver: Any) -> list[list[int]]:
        wanted = WANTS[:4]
        sequences = [driver.add(prompt(4 + i, i), 6, **wants) for i, wants in enumerate(wanted)]
        for turn in range(2):
            driver.step()
            driver.step()
            driver.running = sequences[turn::2]  # the others displaced, by some that rank better
            driver.step()
            driver.running = sequences
            driver.preempt(sequences[turn])
        driver.run()
        return [sequence.tokens for sequence in sequences]

    ours = on_gpu(small.path, block_size=8)
    assert run(ours) == run(drive(small.path, block_size=8, attention_backend="torch"))
    assert ours.executor.taken > 0
    assert ours.executor.wasted > 0


def test_a_guess_from_no_token_is_not_taken(
    small: Any, on_gpu: Make, drive: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, text = on_gpu(small.path), prompt(5)
    sequence = driver.add(text, 6, sampling=Sampling(repetition_penalty=1.5))
    with monkeypatch.context() as patch:
        computed = GpuLlama.logits
        patch.setattr(GpuLlama, "logits", lambda *given: computed(*given) * math.nan)
        driver.step()
        driver.step()
    assert sequence.tokens[5:] == [0, 0]  # the last resort
    driver.run()
    assert driver.executor.taken == 3  # not the two that came after none
    other = drive(small.path, attention_backend="torch")
    wanted = other.add([*text, 0, 0], 4, sampling=Sampling(repetition_penalty=1.5))
    other.run()
    assert sequence.tokens == wanted.tokens


def test_prompt_logprobs_are_those_of_torch(small: Any, on_gpu: Make, drive: Make) -> None:
    def run(driver: Any) -> list[Logprob]:
        driver.add(prompt(6), 2)
        driver.add(prompt(4, 3), 2, prompt_logprobs=1, logprobs=1)
        driver.run()
        return [
            logprob
            for _, result in driver.results
            for found in result.prompt_logprobs
            for logprob in found
        ]

    ours, theirs = run(on_gpu(small.path)), run(drive(small.path, attention_backend="torch"))
    assert len(ours) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert_near(one, other)


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
