"""Logits changed on the device, beside torch's."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch

from baton.types import Sampling, Stopping
from engine.gpu.adjustments import Adjustments
from engine.model.logits import adjust as expected
from engine.model.logits import finite
from scheduling.sequence import Sequence
from tests.engine.sampling import a_sequence, some_logits

_VOCAB = 1100


def _sequences(count: int, seed: int) -> list[Sequence]:
    """Of every mix of what may be asked for; some of the tokens are beyond the vocabulary."""
    rng = random.Random(seed)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(0, _VOCAB + 20) for _ in range(rng.randrange(most)))

    sequences = []
    for _ in range(count):
        sampling = Sampling(
            repetition_penalty=rng.choice([1.0, 1.3, 0.7]),
            presence_penalty=rng.choice([0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, -0.3]),
            logit_bias=tuple((token, rng.uniform(-9, 9)) for token in set(tokens(5))),
            allowed_token_ids=rng.choice([(), (), tokens(30)]),
        )
        sequence = a_sequence(sampling, output=(3, 3, *tokens(40)))
        stopping = Stopping(
            max_tokens=100, min_tokens=rng.choice([0, 20]), eos_token_ids=frozenset({1, 2})
        )
        request = dataclasses.replace(sequence.request, stopping=stopping)
        sequences.append(dataclasses.replace(sequence, request=request))
    return sequences


def _adjusted(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """By the device alone, all of whose tables are new."""
    adjust = Adjustments(logits.shape[1], len(sequences), logits.device)
    return adjust(logits, sequences, [len(sequence.tokens) for sequence in sequences])


def _assert_as_torch(found: torch.Tensor, logits: torch.Tensor, sequences: list[Sequence]) -> None:
    wanted = expected(finite(logits), sequences)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def _penalized(first: int, **sampling: Any) -> Sequence:
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.1}
    return a_sequence(Sampling(**penalties | sampling), output=(first, 5, 5))


def test_logits_are_changed_as_torch_does(device: torch.device) -> None:
    logits = some_logits(12, vocab=_VOCAB, scale=3.0).to(device)
    logits[0, 3], logits[1, 3] = math.nan, math.inf
    sequences = _sequences(12, seed=4)
    _assert_as_torch(_adjusted(logits, sequences), logits, sequences)


def test_min_tokens_yield_where_only_ends_are_allowed(device: torch.device) -> None:
    logits = some_logits(3, vocab=300).to(device, torch.bfloat16)
    sequences = [
        a_sequence(
            Sampling(allowed_token_ids=allowed), min_tokens=5, eos_token_ids=frozenset({7, 400})
        )
        for allowed in ((7,), (7, 8), ())
    ]
    found = _adjusted(logits, sequences)
    assert found[:2].isfinite().nonzero().tolist() == [[0, 7], [1, 8]]
    assert (~found[2].isfinite()).nonzero().tolist() == [[7]]


def test_tables_grow_by_tokens_that_only_the_device_knows(device: torch.device) -> None:
    logits = some_logits(3, vocab=_VOCAB).to(device)
    sequences = [_penalized(row) for row in range(3)]
    adjust = Adjustments(_VOCAB, 3, device)
    adjust(logits, sequences, [len(s.tokens) for s in sequences])
    for sampled in ([5, 900, 0], [900, 900, 3]):
        newest = torch.tensor(sampled, device=device)
        found = adjust(logits, sequences, [len(s.tokens) + 1 for s in sequences], newest)
        for sequence, token in zip(sequences, sampled, strict=True):
            sequence.tokens.append(token)
        _assert_as_torch(found, logits, sequences)
        # The same again, as when a pass that ran ahead is wasted: no token counts twice.
        again = adjust(logits, sequences, [len(s.tokens) for s in sequences])
        assert torch.equal(found, again)


def test_the_last_token_of_a_prompt_is_no_output(device: torch.device) -> None:
    logits = some_logits(1, vocab=_VOCAB).to(device)
    sequence = a_sequence(Sampling(presence_penalty=0.5), output=())
    adjust = Adjustments(_VOCAB, 1, device)
    length = len(sequence.tokens)
    _assert_as_torch(adjust(logits, [sequence], [length]), logits, [sequence])
    found = adjust(logits, [sequence], [length + 1], torch.tensor([8], device=device))
    sequence.tokens.append(8)
    _assert_as_torch(found, logits, [sequence])


def test_min_tokens_count_the_token_that_only_the_device_knows(device: torch.device) -> None:
    logits = some_logits(1, vocab=300).to(device)
    sequence = a_sequence(min_tokens=5, eos_token_ids=frozenset({7}))  # it has 4
    adjust = Adjustments(300, 1, device)
    assert adjust(logits, [sequence], [len(sequence.tokens)])[0, 7] == -math.inf
    newest = torch.tensor([9], device=device)
    assert adjust(logits, [sequence], [len(sequence.tokens) + 1], newest) is logits


def test_who_comes_back_after_others_has_its_table_made_anew(device: torch.device) -> None:
    logits = some_logits(2, vocab=_VOCAB).to(device)
    sequences = [_penalized(row, logit_bias=((row, 2.0),)) for row in range(5)]
    adjust = Adjustments(_VOCAB, 2, device)
    for turn in range(8):
        batch = [sequences[turn % 5], sequences[(turn + 1) % 5]]
        for sequence in batch:
            sequence.tokens += [7 + turn, 20]
        found = adjust(logits, batch, [len(s.tokens) for s in batch])
        _assert_as_torch(found, logits, batch)


def test_a_sequence_whose_token_was_another_is_counted_anew(device: torch.device) -> None:
    logits = some_logits(1, vocab=_VOCAB).to(device)
    sequence = _penalized(1)
    adjust = Adjustments(_VOCAB, 1, device)
    newest = torch.tensor([-1], device=device)  # none was possible, so the host chose one
    adjust(logits, [sequence], [len(sequence.tokens) + 1], newest)
    sequence.tokens.append(300)
    adjust.forget(sequence)
    _assert_as_torch(adjust(logits, [sequence], [len(sequence.tokens)]), logits, [sequence])


def test_rows_that_want_nothing_are_only_made_comparable(device: torch.device) -> None:
    logits = some_logits(3, vocab=300).to(device, torch.bfloat16)
    logits[0, 0], logits[1, 1] = math.nan, math.inf
    sequences = [a_sequence(), a_sequence(), _penalized(0)]
    found = _adjusted(logits, sequences)
    assert torch.equal(found[:2], finite(logits)[:2])


def test_logits_that_nobody_wants_changed_stay_where_they_are(device: torch.device) -> None:
    logits = some_logits(2, vocab=300).to(device, torch.bfloat16)
    assert _adjusted(logits, [a_sequence(), a_sequence()]) is logits


@pytest.mark.gpu
def test_a_large_vocabulary_is_changed_as_torch_does(device: torch.device) -> None:
    logits = some_logits(64, vocab=128_256).to(device, torch.bfloat16)
    sequences = _sequences(64, seed=9)
    _assert_as_torch(_adjusted(logits, sequences), logits, sequences)
