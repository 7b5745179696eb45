"""Logits changed on the device, beside torch's."""

from __future__ import annotations

import dataclasses
import math
import random

import torch

from baton.types import Sampling, Stopping
from engine.gpu.adjustments import tables_of
from engine.gpu.kernels.adjust import adjust, note
from engine.model.logits import adjust as expected
from engine.model.logits import finite
from scheduling.sequence import Sequence
from tests.engine.test_sampler import a_sequence, some_logits

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


def test_logits_are_changed_as_torch_does(device: torch.device) -> None:
    logits = some_logits(12, vocab=_VOCAB, scale=3.0).to(device)
    logits[0, 3], logits[1, 3] = math.nan, math.inf
    sequences = _sequences(12, seed=4)
    found = adjust(logits, tables_of(sequences, device))
    wanted = expected(finite(logits), sequences)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_min_tokens_yield_where_only_ends_are_allowed(device: torch.device) -> None:
    logits = some_logits(2, vocab=300).to(device, torch.bfloat16)
    stopping = Stopping(max_tokens=9, min_tokens=5, eos_token_ids=frozenset({7}))
    sequences = []
    for allowed in ((7,), (7, 8)):
        sequence = a_sequence(Sampling(allowed_token_ids=allowed))
        request = dataclasses.replace(sequence.request, stopping=stopping)
        sequences.append(dataclasses.replace(sequence, request=request))
    found = adjust(logits, tables_of(sequences, device))
    assert found.isfinite().nonzero().tolist() == [[0, 7], [1, 8]]


def test_tables_grow_as_the_host_would_make_them(device: torch.device) -> None:
    logits = some_logits(3, vocab=_VOCAB).to(device)
    sequences = [
        a_sequence(
            Sampling(repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.1),
            output=(row, 5, 5),
        )
        for row in range(3)
    ]
    tables = tables_of(sequences, device, room=2)
    for sampled in ([5, 900, 0], [900, 900, -1]):
        note(torch.tensor(sampled, device=device), tables)
        for sequence, token in zip(sequences, sampled, strict=True):
            sequence.tokens += [token] if token >= 0 else []
    wanted = expected(finite(logits), sequences)
    torch.testing.assert_close(adjust(logits, tables), wanted, rtol=1e-6, atol=1e-6)


def test_rows_that_want_nothing_are_only_made_comparable(device: torch.device) -> None:
    logits = some_logits(2, vocab=300).to(device)
    logits[0, 0], logits[1, 1] = math.nan, math.inf
    found = adjust(logits, tables_of([a_sequence(), a_sequence()], device))
    assert torch.equal(found, finite(logits))
