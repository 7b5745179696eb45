"""Tokens and log probabilities that the device gives, beside those of torch's sampler."""

from __future__ import annotations

import math

import pytest
import torch

from baton.types import Sampling
from engine.gpu.sampler import DeviceSampler
from engine.model.sampler import choose
from engine.model.sampler import sample as sample_with
from scheduling.sequence import Sequence
from tests.engine.sampling import a_sequence, some_logits


def _lengths(sequences: list[Sequence]) -> list[int]:
    return [len(sequence.tokens) for sequence in sequences]


def test_adjusted_rows_are_chosen_as_torch_does_and_others_as_without_them(
    device: torch.device,
) -> None:
    logits = some_logits(6, vocab=900).to(device, torch.bfloat16)
    plain = [
        a_sequence(Sampling(temperature=0.8 * (row % 4), top_p=0.9, seed=row)) for row in range(6)
    ]
    sequences = list(plain)
    for row, sampling in {
        1: Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.3, seed=1),
        4: Sampling(allowed_token_ids=(1, 2, 3)),
    }.items():
        sequences[row] = a_sequence(sampling)
    found = DeviceSampler(900, 6, device).draw(logits, sequences, _lengths(sequences)).sampled()
    assert found == sample_with(logits, sequences)
    alone = choose(logits, plain)
    for row in (0, 2, 3, 5):
        assert found[row].token_id == alone[row]


def test_where_no_token_is_possible_the_host_has_a_last_resort(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    logits = some_logits(3, vocab=300).to(device)
    logits[1] = -math.inf
    penalized = Sampling(presence_penalty=20.0)
    ends = frozenset({7})
    sequences = [a_sequence(penalized, logprobs=1, eos_token_ids=ends) for _ in range(3)]
    sampler = DeviceSampler(300, 3, device)
    draw = sampler.draw(logits, sequences, _lengths(sequences))
    assert draw.tokens[1] == -1
    ahead = [length + 1 for length in _lengths(sequences)]
    sampler.draw(logits, sequences, ahead, draw.tokens)  # in vain
    found, wanted = draw.sampled(), sample_with(logits, sequences)
    assert [sampled.token_id for sampled in found] == [s.token_id for s in wanted]
    assert found[1].logprob == wanted[1].logprob  # of token 7, -inf
    assert not draw.goes_on
    # What the host chose is penalized.
    for sequence, sampled in zip(sequences, found, strict=True):
        sequence.tokens.append(sampled.token_id)
    logits = some_logits(3, vocab=300).to(device)
    logits[:, 7] += 15.0
    again = sampler.draw(logits, sequences, _lengths(sequences)).tokens.tolist()
    assert again[::2] == [7, 7]
    assert again == [sampled.token_id for sampled in sample_with(logits, sequences)]
    assert again[1] != 7
