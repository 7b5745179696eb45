"""The sampler against transformers' own processors, its statistics, and its independence."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from baton.types import Sampling
from engine.model.logits import adjust, finite, warp
from engine.model.sampler import sample
from scheduling.sequence import Sequence
from tests.engine.sampling import PROMPT, VOCAB, a_sequence, some_logits


def distribution(logits: Tensor, sequence: Sequence) -> Tensor:
    scores = adjust(finite(logits), [sequence])
    return warp(scores, [sequence.request.sampling]).softmax(dim=-1)


def tokens_of(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    return [sampled.token_id for sampled in sample(logits, sequences)]


TRANSFORMERS = {
    "temperature": (Sampling(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
    "top-k": (Sampling(temperature=1.0, top_k=20), [TopKLogitsWarper(20)]),
    "top-k over the vocabulary": (Sampling(temperature=1.0, top_k=5000), [TopKLogitsWarper(5000)]),
    "top-p": (Sampling(temperature=1.0, top_p=0.8), [TopPLogitsWarper(0.8)]),
    "top-p of almost all": (Sampling(temperature=9.0, top_p=0.999), [
        TemperatureLogitsWarper(9.0), TopPLogitsWarper(0.999)]),
    "min-p": (Sampling(temperature=1.0, min_p=0.05), [MinPLogitsWarper(0.05)]),
    "repetition": (
        Sampling(temperature=1.0, repetition_penalty=1.8),
        [RepetitionPenaltyLogitsProcessor(1.8)],
    ),
    "bias": (
        Sampling(temperature=1.0, logit_bias=((7, 5.0), (17, -4.0))),
        [SequenceBiasLogitsProcessor({(7,): 5.0, (17,): -4.0})],
    ),
    "all of them": (
        Sampling(
            temperature=0.6,
            top_k=40,
            top_p=0.9,
            min_p=0.02,
            repetition_penalty=1.3,
            logit_bias=((7, 2.0),),
        ),
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            SequenceBiasLogitsProcessor({(7,): 2.0}),
            TemperatureLogitsWarper(0.6),
            TopKLogitsWarper(40),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("vocab", [VOCAB, 5000])
def test_the_distribution_is_that_of_transformers(name: str, vocab: int) -> None:
    sampling, processors = TRANSFORMERS[name]
    sequence = a_sequence(sampling)
    for seed in range(5):
        logits = some_logits(1, seed, vocab)
        ids = torch.tensor([sequence.tokens])
        fresh = LogitsProcessorList(copy.deepcopy(processors))  # they remember the vocabulary
        expected = fresh(ids, logits.clone()).softmax(dim=-1)
        actual = distribution(logits, sequence)
        assert torch.equal(actual > 0, expected > 0)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_rows_with_different_settings_do_not_mix() -> None:
    samplings = [sampling for sampling, _ in TRANSFORMERS.values()]
    logits = some_logits(len(samplings), vocab=5000)
    together = warp(logits, samplings)
    for row, sampling in enumerate(samplings):
        torch.testing.assert_close(together[row : row + 1], warp(logits[row : row + 1], [sampling]))


def test_min_tokens_forbids_ends_as_transformers_does() -> None:
    sequence = a_sequence(
        Sampling(temperature=1.0), min_tokens=5, eos_token_ids=frozenset({11, 12})
    )
    logits = some_logits(1)
    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, [11, 12])
    expected = processor(torch.tensor([sequence.tokens]), logits.clone()).softmax(dim=-1)
    torch.testing.assert_close(distribution(logits, sequence), expected)


def test_the_first_min_tokens_cannot_end_a_sequence_and_the_next_one_can() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 11], logits[0, 12] = 9.0, 8.0
    sequence = a_sequence(
        output=(),
        min_tokens=3,
        eos_token_ids=frozenset({11}),
        stop_token_ids=frozenset({12}),
    )
    ends = [sequence.append(tokens_of(logits, [sequence])[0]) for _ in range(4)]
    assert sequence.tokens[len(PROMPT) :] == [0, 0, 0, 11]
    assert ends[:3] == [None, None, None]
    assert ends[3] is not None and ends[3].is_eos


def test_presence_and_frequency_penalties_count_output_tokens_only() -> None:
    # OpenAI: mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
    sequence = a_sequence(Sampling(presence_penalty=0.5, frequency_penalty=0.25))
    logits = some_logits(1)
    change = adjust(logits, [sequence]) - logits
    expected = torch.zeros(1, VOCAB)
    expected[0, 17], expected[0, 250], expected[0, 599] = -0.75, -1.0, -0.75
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=0)


def test_only_allowed_tokens_are_sampled() -> None:
    logits = some_logits(50)
    allowed = (3, 400, 599)
    for temperature in (0.0, 1.5):
        sequences = [
            a_sequence(Sampling(temperature=temperature, seed=s, allowed_token_ids=allowed))
            for s in range(50)
        ]
        assert set(tokens_of(logits, sequences)) <= set(allowed)


def test_min_tokens_yields_where_it_forbids_every_allowed_token() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 12] = 50.0
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, allowed_token_ids=(11, 12))
        ends = frozenset({11, 12})
        sequence = a_sequence(sampling, output=(), min_tokens=2, eos_token_ids=ends)
        finishes = [sequence.append(tokens_of(logits, [sequence])[0]) for _ in range(3)]
        assert sequence.tokens[len(PROMPT) :] == [12, 12, 12]  # the likelier of the two
        assert [finish is not None for finish in finishes] == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_the_largest_logits(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, VOCAB, dtype=dtype)
    logits[0, [40, 500]] = 2.0
    logits[1, 599] = 1.0
    plain = [a_sequence(), a_sequence()]
    reported = [a_sequence(logprobs=0), a_sequence(logprobs=0)]
    assert tokens_of(logits, plain) == tokens_of(logits, reported) == [40, 599]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = some_logits(20)
    for temperature in (1e-4, 1e-30, 5e-324):
        sequences = [a_sequence(Sampling(temperature=temperature, seed=s)) for s in range(20)]
        assert tokens_of(logits, sequences) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=1.3, top_k=30),
        Sampling(temperature=0.8, top_p=0.7, min_p=0.01),
    ],
)
def test_sampled_frequencies_fit_the_distribution(sampling: Sampling) -> None:
    draws = 20_000
    logits = some_logits(1, scale=1.5)
    sequences = [
        a_sequence(
            Sampling(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                seed=1234,
            ),
            index=n % 100,
            output=(0,) * (n // 100),
        )
        for n in range(draws)
    ]
    expected = distribution(logits, sequences[0])[0].double() * draws
    tokens = tokens_of(logits.expand(draws, -1), sequences)
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    cells = [*zip(counts[common], expected[common], strict=True)]
    cells += [(counts[~common].sum(), expected[~common].sum())]
    chi_square = sum(float((c - e) ** 2 / e) for c, e in cells if e > 0)
    degrees = len(cells) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees) + 8  # beyond p = 0.001


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others() -> None:
    def run(seed: int, index: int = 0) -> list[int]:
        sequences = [
            a_sequence(Sampling(temperature=1.0, seed=seed), index=index, output=(0,) * n)
            for n in range(20)
        ]
        return tokens_of(torch.zeros(20, VOCAB), sequences)

    assert run(7) == run(7)
    assert len({tuple(run(7)), tuple(run(8)), tuple(run(7 + 2**40)), tuple(run(7, index=1))}) == 4


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 7, 10_000]),
    top_p=st.sampled_from([0.1, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    seed=st.integers(0, 2**64 - 1),
    allowed_token_ids=st.sampled_from([(), (1, 2, 3, 300)]),
)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(
        st.tuples(samplings, st.integers(0, 3), st.sampled_from([None, 0, 5])),
        min_size=2,
        max_size=12,
    ),
    seed=st.integers(0, 1000),
    broken=st.booleans(),
)
def test_a_token_and_its_logprob_do_not_depend_on_the_batch_around_it(
    batch: list[tuple[Sampling, int, int | None]], seed: int, broken: bool
) -> None:
    sequences = [
        a_sequence(sampling, index=index, logprobs=logprobs) for sampling, index, logprobs in batch
    ]
    logits = some_logits(len(batch), seed, vocab=1500)
    if broken:
        logits[-1] = math.nan
    together = sample(logits, sequences)
    backwards = sample(logits.flip(0), sequences[::-1])[::-1]
    for row, sequence in enumerate(sequences):
        (alone,) = sample(logits[row : row + 1], [sequence])
        for other in (together[row], backwards[row]):
            assert other.token_id == alone.token_id
            assert (other.logprob is None) == (alone.logprob is None)
            if alone.logprob and other.logprob and not math.isinf(alone.logprob.logprob):
                assert abs(alone.logprob.logprob - other.logprob.logprob) < 1e-5


def test_noise_in_the_last_bits_of_the_logits_hardly_ever_changes_a_token() -> None:
    # A flat distribution over a large vocabulary: one point on a cumulative sum would land on a
    # neighbour in a good part of these draws.
    rows, vocab = 500, 32_000
    logits = some_logits(rows, vocab=vocab, scale=0.5)
    noisy = logits + some_logits(rows, seed=1, vocab=vocab, scale=1e-5)
    sequences = [a_sequence(Sampling(temperature=1.0, seed=s)) for s in range(rows)]
    pairs = zip(tokens_of(logits, sequences), tokens_of(noisy, sequences), strict=True)
    assert sum(a != b for a, b in pairs) <= 2


def test_nan_and_infinite_logits_count_as_impossible_and_as_best() -> None:
    logits = some_logits(4, scale=1.0)
    logits[0, :] = math.nan
    logits[0, 77] = 0.0
    logits[1, 88] = math.inf
    logits[2, :] = -math.inf
    logits[2, 99] = -5.0
    assert tokens_of(logits[:3], [a_sequence()] * 3) == [77, 88, 99]
    for temperature in (0.0, 1.0):
        sequences = [a_sequence(Sampling(temperature=temperature), logprobs=1) for _ in range(4)]
        sampled = sample(logits, sequences)
        assert [s.token_id for s in sampled[:3]] == [77, 88, 99]
        assert sampled[3].token_id == tokens_of(logits[3:], sequences[3:])[0]
        for s in sampled[:3]:
            assert s.logprob is not None
            assert s.logprob.rank == 1
            assert s.logprob.logprob == pytest.approx(0.0, abs=1e-5)


def test_a_row_without_any_possible_token_ends_if_it_may_and_harms_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logits = some_logits(4)
    logits[:3] = math.nan
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature)
        constrained = Sampling(temperature=temperature, allowed_token_ids=(8, 9))
        eos = frozenset({11})
        sequences = [
            a_sequence(sampling, eos_token_ids=eos, stop_token_ids=frozenset({2})),
            a_sequence(constrained, eos_token_ids=eos),
            a_sequence(sampling, logprobs=1),
            a_sequence(sampling),
        ]
        sampled = sample(logits, sequences)
        assert [s.token_id for s in sampled[:3]] == [11, 8, 0]
        assert sampled[2].logprob is not None
        assert sampled[2].logprob.logprob == -math.inf
        assert sampled[3].token_id == tokens_of(logits[3:], sequences[3:])[0]
    assert "request r: no token is possible" in caplog.text


def test_an_empty_batch_gives_nothing() -> None:
    assert sample(torch.zeros(0, VOCAB), []) == []


def test_logits_that_requests_adjust_are_left_as_they_were() -> None:
    logits = some_logits(3)
    before = logits.clone()
    penal = Sampling(temperature=0.7, repetition_penalty=1.5, seed=3)
    sequences = [a_sequence(), a_sequence(penal, logprobs=2), a_sequence(Sampling(seed=4))]
    sample(logits, sequences)
    assert torch.equal(logits, before)


def test_only_rows_that_need_it_are_copied_for_penalties() -> None:
    seen: list[tuple[int, torch.Tensor]] = []

    def choice(scores: torch.Tensor, sequences: list[Sequence]) -> list[int]:
        seen.append((scores.data_ptr(), scores.clone()))
        return [0] * len(sequences)

    logits = some_logits(3)
    penal = Sampling(temperature=0.7, logit_bias=((5, 2.0),))
    sample(logits, [a_sequence(Sampling()), a_sequence(penal), a_sequence(Sampling())], choice)
    ((place, scores),) = seen
    assert place == logits.data_ptr()
    change = scores - logits
    assert change[1, 5] == pytest.approx(2.0)
    change[1, 5] = 0
    assert not change.any()
