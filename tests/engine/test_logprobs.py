"""Log probabilities of tokens and of prompts."""

from __future__ import annotations

import math

import torch

from baton.types import Sampling
from engine.model.sampler import prompt_logprobs, sample, torch_logprobs
from tests.engine.sampling import VOCAB, a_sequence, some_logits


def test_logprobs_are_of_the_model_before_penalties_and_temperature() -> None:
    logits = some_logits(3).to(torch.bfloat16)
    sequences = [
        a_sequence(Sampling(temperature=0.5, repetition_penalty=2.0, top_k=1), logprobs=4),
        a_sequence(),
        a_sequence(Sampling(allowed_token_ids=(123,)), logprobs=0),
    ]
    expected = logits.float().log_softmax(dim=-1)
    first, second, third = sample(logits, sequences)
    assert second.logprob is None
    for row, sampled in ((0, first), (2, third)):
        report = sampled.logprob
        assert report is not None and report.token_id == sampled.token_id
        assert abs(report.logprob - float(expected[row, sampled.token_id])) < 1e-5
        assert report.rank == 1 + int((expected[row] > expected[row, sampled.token_id]).sum())
    assert third.token_id == 123
    assert third.logprob is not None and third.logprob.top == ()
    assert first.logprob is not None and len(first.logprob.top) == 4
    for (token, value), wanted in zip(
        first.logprob.top, expected[0].sort(descending=True).values, strict=False
    ):
        assert abs(value - float(wanted)) < 1e-5
        assert abs(value - float(expected[0, token])) < 1e-5


def test_prompt_logprobs_are_within_1e_5_of_log_softmax() -> None:
    logits = some_logits(150)
    targets = [(31 * row) % VOCAB for row in range(150)]
    expected = logits.double().log_softmax(dim=-1)
    reports = prompt_logprobs(logits, targets, 2)
    assert [report.token_id for report in reports] == targets
    for row, report in enumerate(reports):
        assert abs(report.logprob - float(expected[row, targets[row]])) < 1e-5
        assert report.rank == 1 + int((expected[row] > expected[row, targets[row]]).sum())
        assert [token for token, _ in report.top] == expected[row].topk(2).indices.tolist()
    assert prompt_logprobs(logits[:0], [], 2) == ()


def test_more_alternatives_than_tokens_gives_all_of_them() -> None:
    (report,) = prompt_logprobs(some_logits(1, vocab=8), [3], 20)
    assert sorted(token for token, _ in report.top) == list(range(8))


def test_likeliest_tokens_that_tie_are_told_lowest_first() -> None:
    logits = torch.zeros(2, 5000)
    logits[0, [4000, 3, 2000]] = 1.0
    logits[1] = torch.arange(5000.0)
    first, second = torch_logprobs(logits, [0, 1], [2000, 0], [5, 2])
    assert [token for token, _ in first.top] == [3, 2000, 4000, 0, 1]
    assert (first.rank, second.rank) == (1, 5000)
    assert [token for token, _ in second.top] == [4999, 4998]


def test_a_token_that_is_impossible_beside_others_has_no_probability() -> None:
    logits = some_logits(1)
    logits[0, 7] = -math.inf
    (report,) = torch_logprobs(logits, [0], [7], [1])
    assert report.logprob == -math.inf
