"""Tokens that kernels choose, beside those of torch's sampler."""

from __future__ import annotations

import math
import random

import pytest
import torch

from baton.types import Sampling
from engine.gpu.choice import DeviceChoice
from engine.model.sampler import choose
from engine.model.sampler import sample as sample_with
from scheduling.sequence import Sequence
from tests.engine.sampling import a_sequence, some_logits


def _random_sequences(count: int, seed: int) -> list[Sequence]:
    rng = random.Random(seed)
    return [
        a_sequence(
            Sampling(
                temperature=rng.choice([0.0, 1e-30, 0.3, 0.7, 1.0, 2.0]),
                top_k=rng.choice([0, 0, 1, 3, 7, 50, 10**10]),
                top_p=rng.choice([1.0, 1.0, 0.01, 0.5, 0.9, 0.999]),
                min_p=rng.choice([0.0, 0.0, 0.05, 0.3, 1.0]),
                seed=rng.getrandbits(64),
            ),
            index=rng.randrange(5),
            output=(0,) * rng.randrange(1, 300),
        )
        for _ in range(count)
    ]


def _rows(device: torch.device) -> int:
    """Few for the interpreter, which is slow."""
    return 6 if device.type == "cpu" else 300


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("vocab", [1, 255, 1500, 5000])
def test_tokens_are_those_of_torch_for_any_mix_of_settings(
    device: torch.device, vocab: int, scale: float
) -> None:
    rows = _rows(device)
    logits = some_logits(rows, seed=vocab, vocab=vocab, scale=scale).to(device)
    sequences = _random_sequences(rows, seed=vocab + int(scale))
    assert DeviceChoice(device)(logits, sequences) == choose(logits, sequences)


def test_ties_are_cut_and_chosen_as_torch_does(device: torch.device) -> None:
    # Few different values: every cut goes through a group of equal ones, and keeps all of it.
    rows = 2 * _rows(device)
    logits = some_logits(rows, vocab=900, scale=2.0).round().to(device)
    sequences = _random_sequences(rows, seed=1)
    assert DeviceChoice(device)(logits, sequences) == choose(logits, sequences)


def test_values_that_differ_in_the_last_bit_are_told_apart(device: torch.device) -> None:
    above = torch.nextafter(torch.tensor(7.0), torch.tensor(8.0)).item()
    logits = torch.full((4, 600), 7.0, device=device)
    logits[:, 100:300] = above
    sampling = Sampling(temperature=1e-6, top_k=150)
    sequences = [a_sequence(sampling, index=index) for index in range(4)]
    assert DeviceChoice(device)(logits, sequences) == choose(logits, sequences)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_broken_logits_count_as_in_torch(device: torch.device, temperature: float) -> None:
    logits = some_logits(7, vocab=700).to(device)
    logits[0, ::3] = math.nan
    logits[1, 77] = math.inf
    logits[2, [5, 690]] = math.inf
    logits[3, :] = -math.inf
    logits[4, :] = math.nan
    logits[5, :] = -math.inf
    logits[5, 699] = -1e38
    for top_k, top_p in ((3, 1.0), (500, 0.9)):
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=0.01)
        sequences = [a_sequence(sampling, index=index) for index in range(7)]
        tokens = DeviceChoice(device)(logits, sequences)
        assert tokens == choose(logits, sequences)
        assert tokens[3:6] == [-1, -1, 699]
        if not temperature:
            break


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_may_have_any_float_type(device: torch.device, dtype: torch.dtype) -> None:
    rows = _rows(device)
    logits = some_logits(rows, vocab=800).to(device, dtype)
    sequences = _random_sequences(rows, seed=3)
    assert DeviceChoice(device)(logits, sequences) == choose(logits, sequences)


def test_rows_may_lie_apart_and_a_token_does_not_depend_on_the_others(
    device: torch.device,
) -> None:
    logits = some_logits(8, vocab=700).to(device)
    sequences = _random_sequences(8, seed=2)
    choice = DeviceChoice(device)
    together = choice(logits, sequences)
    assert choice(logits[::2, 100:], sequences[::2]) == choose(logits[::2, 100:], sequences[::2])
    for row in (1, 6):
        assert choice(logits[row : row + 1], [sequences[row]]) == together[row : row + 1]


def test_greedy_rows_take_the_lowest_of_the_best(device: torch.device) -> None:
    logits = torch.zeros(3, 600, device=device)
    logits[0, [300, 580]] = 1.0
    logits[2] = -math.inf
    sequences = [a_sequence(Sampling(), index=index) for index in range(3)]
    assert DeviceChoice(device)(logits, sequences) == [300, 0, -1]


def test_adjusted_rows_and_logprobs_are_those_of_torch(device: torch.device) -> None:
    logits = some_logits(6, vocab=900).to(device)
    sequences = [
        a_sequence(
            Sampling(
                temperature=0.8,
                top_p=0.9,
                repetition_penalty=1.3 if row % 2 else 1.0,
                allowed_token_ids=(1, 2, 3) if row == 4 else (),
                seed=row,
            ),
            logprobs=2 if row % 4 == 0 else None,
        )
        for row in range(6)
    ]
    assert sample_with(logits, sequences, DeviceChoice(device)) == sample_with(logits, sequences)


def test_an_empty_batch_gives_nothing(device: torch.device) -> None:
    assert DeviceChoice(device)(torch.zeros(0, 600, device=device), []) == []


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_tokens_are_those_of_torch_at_a_large_vocabulary(
    device: torch.device, scale: float
) -> None:
    logits = some_logits(64, vocab=128_256, scale=scale).to(device, torch.bfloat16)
    sequences = _random_sequences(64, seed=5)
    assert DeviceChoice(device)(logits, sequences) == choose(logits, sequences)
