"""Log probabilities from the device, beside those of torch's sampler."""

from __future__ import annotations

import math

import pytest
import torch

from baton.types import Logprob
from engine.gpu.reports import Report
from engine.model.sampler import torch_logprobs
from tests.engine.sampling import a_sequence, some_logits


def _assert_as_torch(
    logits: torch.Tensor, tokens: list[int], counts: list[int | None]
) -> dict[int, Logprob]:
    """What Report gives is what torch gives for the rows that want it."""
    sequences = [a_sequence(logprobs=count, eos_token_ids=frozenset({3})) for count in counts]
    found = Report(logits, torch.tensor(tokens, device=logits.device), sequences).wait()
    rows = [row for row, count in enumerate(counts) if count is not None]
    targets = [token if token >= 0 else 3 for token in (tokens[row] for row in rows)]
    alternatives = [count for count in counts if count is not None]
    wanted = torch_logprobs(logits, rows, targets, alternatives)
    assert list(found) == rows
    for ours, theirs in zip(found.values(), wanted, strict=True):
        assert (ours.token_id, ours.rank) == (theirs.token_id, theirs.rank)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        shares = [share for _, share in theirs.top]
        assert [share for _, share in ours.top] == pytest.approx(shares, abs=1e-5)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_those_that_want_it_are_told_as_many_as_they_want(
    device: torch.device, dtype: torch.dtype
) -> None:
    logits = some_logits(5, vocab=1500).to(device, dtype)
    found = _assert_as_torch(logits, [7, 1499, 0, 256, 9], [3, None, 0, 20, 1])
    assert [len(report.top) for report in found.values()] == [3, 0, 20, 1]


def test_nobody_need_want_alternatives(device: torch.device) -> None:
    logits = some_logits(2, vocab=300).to(device)
    found = _assert_as_torch(logits[:, :290], [7, 100], [0, 0])  # rows may lie apart
    assert [report.top for report in found.values()] == [(), ()]


@pytest.mark.parametrize("vocab", [1, 13, 512, 2000])
def test_of_those_that_tie_the_lowest_come_first(device: torch.device, vocab: int) -> None:
    logits = some_logits(4, vocab=vocab, scale=1.0).round().to(device)
    logits[2] = 0.0
    logits[3] = torch.where(torch.arange(vocab, device=device) % 2 == 0, 0.0, -0.0)
    _assert_as_torch(logits, [0] * 4, [20, 5, 20, 20])


def test_broken_logits_count_as_in_torch(device: torch.device) -> None:
    logits = some_logits(5, vocab=700).to(device)
    logits[0, ::3] = math.nan
    logits[1, [77, 650]] = math.inf
    logits[2, :] = -math.inf
    logits[3, :] = math.nan
    logits[4, 5:] = -math.inf
    found = _assert_as_torch(logits, [0, 77, -1, -1, 2], [20] * 5)
    assert (found[2].token_id, found[2].logprob) == (3, -math.inf)


@pytest.mark.gpu
def test_a_large_vocabulary_is_told_of_as_by_torch(device: torch.device) -> None:
    logits = some_logits(64, vocab=128_256).to(device, torch.bfloat16)
    _assert_as_torch(logits, list(range(64)), [20, None] * 32)
