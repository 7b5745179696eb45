"""Tokens that the compiled library chooses, beside those of torch's sampler."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch

from baton.errors import ModelError
from baton.types import Logprob, Sampling
from engine.model.sampler import choose, sample, torch_logprobs
from engine.native.library import Isa, Library
from engine.native.sampling import CompiledChoice
from scheduling.sequence import Sequence
from tests.engine.native.conftest import TeamOf
from tests.engine.sampling import a_sequence, some_logits
from tests.engine.test_sampler import distribution

ChoiceOf = Callable[..., CompiledChoice]

# Those with kernels of their own; the others sample with AVX-512.
ISAS = (Isa.PORTABLE, Isa.AVX2, Isa.AVX512)


@pytest.fixture
def choice(library: Library, team: TeamOf) -> ChoiceOf:
    """The compiled choice of an instruction set and a number of threads."""

    def of(isa: Isa = library.isa, threads: int = 2) -> CompiledChoice:
        if isa > library.isa:
            pytest.skip(f"this machine lacks {library.isa_name(isa)}")
        functions, threads_of = library.functions, team(threads)
        return CompiledChoice(
            lambda draws: library.check(functions.baton_sample(threads_of, isa, draws)),
            lambda reports: library.check(functions.baton_report(threads_of, isa, reports)),
        )

    return of


def random_sampling(rng: random.Random) -> Sampling:
    return Sampling(
        temperature=rng.choice([0.0, 1e-30, 0.3, 0.7, 1.0, 2.0]),
        top_k=rng.choice([0, 0, 1, 7, 50, 1000, 10**9]),
        top_p=rng.choice([1.0, 1.0, 0.01, 0.5, 0.9, 0.95, 0.999]),
        min_p=rng.choice([0.0, 0.0, 0.05, 0.3, 1.0]),
        seed=rng.getrandbits(64),
    )


def random_sequences(count: int, seed: int) -> list[Sequence]:
    rng = random.Random(seed)
    return [
        a_sequence(
            random_sampling(rng), index=rng.randrange(5), output=(0,) * rng.randrange(1, 300)
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 5, 255, 256, 600, 1500, 20_000])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 4.0, 30.0])
def test_tokens_are_those_of_torch_for_any_mix_of_settings(
    choice: ChoiceOf, isa: Isa, vocab: int, scale: float
) -> None:
    rows = 100
    logits = some_logits(rows, seed=vocab, vocab=vocab, scale=scale)
    sequences = random_sequences(rows, seed=vocab)
    assert choice(isa)(logits, sequences) == choose(logits, sequences)


@pytest.mark.parametrize("isa", ISAS)
def test_ties_are_cut_and_chosen_as_torch_does(choice: ChoiceOf, isa: Isa) -> None:
    # Few different values: every cut goes through a group of equal ones, and keeps all of it.
    rows, vocab = 400, 3000
    logits = some_logits(rows, vocab=vocab, scale=2.0).round()
    sequences = random_sequences(rows, seed=1)
    assert choice(isa)(logits, sequences) == choose(logits, sequences)


@pytest.mark.parametrize("isa", ISAS)
def test_values_that_differ_in_the_last_bit_are_told_apart(choice: ChoiceOf, isa: Isa) -> None:
    above = torch.nextafter(torch.tensor(7.0), torch.tensor(8.0)).item()
    logits = torch.full((40, 2000), 7.0)
    logits[:, 100:300] = above
    sampling = Sampling(temperature=1e-6, top_k=150)
    sequences = [a_sequence(sampling, index=index) for index in range(40)]
    assert choice(isa)(logits, sequences) == choose(logits, sequences)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_broken_logits_count_as_in_torch(choice: ChoiceOf, isa: Isa, temperature: float) -> None:
    logits = some_logits(7, vocab=700)
    logits[0, ::3] = math.nan
    logits[1, 77] = math.inf
    logits[2, [5, 690]] = math.inf
    logits[3, :] = -math.inf
    logits[4, :] = math.nan
    logits[5, :] = -math.inf
    logits[5, 699] = -1e38
    for top_k, top_p in itertools.product((0, 3, 500), (1.0, 0.9)):
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=0.01)
        sequences = [a_sequence(sampling, index=index) for index in range(7)]
        tokens = choice(isa)(logits, sequences)
        assert tokens == choose(logits, sequences)
        assert tokens[3:6] == [-1, -1, 699]


def test_a_row_without_any_possible_token_ends_if_it_may(
    choice: ChoiceOf, caplog: pytest.LogCaptureFixture
) -> None:
    logits = torch.full((2, 600), math.nan)
    sequences = [
        a_sequence(Sampling(temperature=1.0), eos_token_ids=frozenset({11})),
        a_sequence(Sampling(temperature=1.0, allowed_token_ids=(8, 9))),
    ]
    assert [s.token_id for s in sample(logits, sequences, choice())] == [11, 8]
    assert "no token is possible" in caplog.text


def test_adjusted_rows_and_logprobs_are_those_of_torch(choice: ChoiceOf) -> None:
    logits = some_logits(40, vocab=5000)
    sequences = [
        a_sequence(
            Sampling(
                temperature=0.8,
                top_p=0.9,
                repetition_penalty=1.3 if row % 2 else 1.0,
                presence_penalty=0.5 if row % 3 else 0.0,
                logit_bias=((7, 5.0),) if row % 5 else (),
                allowed_token_ids=(1, 2, 3) if row % 7 == 0 else (),
                seed=row,
            ),
            logprobs=2 if row % 4 == 0 else None,
        )
        for row in range(40)
    ]
    for ours, theirs in zip(
        sample(logits, sequences, choice()), sample(logits, sequences), strict=True
    ):
        assert ours.token_id == theirs.token_id
        assert (ours.logprob is None) == (theirs.logprob is None)
        if ours.logprob is not None and theirs.logprob is not None:
            assert ours.logprob.rank == theirs.logprob.rank
            assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-5)
            assert [token for token, _ in ours.logprob.top] == [t for t, _ in theirs.logprob.top]
            found = [share for _, share in ours.logprob.top]
            assert found == pytest.approx([share for _, share in theirs.logprob.top], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_may_have_any_float_type(choice: ChoiceOf, dtype: torch.dtype) -> None:
    logits = some_logits(20, vocab=800).to(dtype)
    sequences = random_sequences(20, seed=3)
    assert choice()(logits, sequences) == choose(logits, sequences)


def test_a_token_depends_neither_on_the_batch_around_it_nor_on_the_threads(
    choice: ChoiceOf,
) -> None:
    logits = some_logits(30, vocab=4000)
    logits[7, 3000] = math.nan
    sequences = random_sequences(30, seed=2)
    together = choice(threads=1)(logits, sequences)
    for threads in (2, 3, 8):
        assert choice(threads=threads)(logits, sequences) == together
    backwards = choice()(logits.flip(0), sequences[::-1])
    assert backwards[::-1] == together
    for row, sequence in enumerate(sequences):
        assert choice()(logits[row : row + 1], [sequence]) == together[row : row + 1]


def test_an_empty_batch_gives_nothing(choice: ChoiceOf) -> None:
    assert choice()(torch.zeros(0, 600), []) == []


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=1234),
        Sampling(temperature=1.3, top_k=30, seed=1234),
        Sampling(temperature=0.8, top_p=0.7, min_p=0.01, seed=1234),
    ],
)
def test_sampled_frequencies_fit_the_distribution(choice: ChoiceOf, sampling: Sampling) -> None:
    draws = 50_000
    logits = some_logits(1, scale=1.5)
    sequence = a_sequence(sampling)
    sequences = [
        a_sequence(sampling, index=n % 1000, output=(0,) * (n // 1000)) for n in range(draws)
    ]
    tokens = choice()(logits.expand(draws, -1), sequences)
    expected = distribution(logits, sequence)[0].double() * draws
    counts = torch.bincount(torch.tensor(tokens), minlength=logits.shape[-1]).double()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    cells = [*zip(counts[common], expected[common], strict=True)]
    cells += [(counts[~common].sum(), expected[~common].sum())]
    chi_square = sum(float((c - e) ** 2 / e) for c, e in cells if e > 0)
    degrees = len(cells) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees) + 8  # beyond p = 0.001


def test_an_instruction_set_that_the_machine_lacks_is_refused(
    library: Library, team: TeamOf
) -> None:
    functions = library.functions
    beyond = CompiledChoice(
        lambda draws: library.check(functions.baton_sample(team(1), 99, draws)),
        lambda reports: library.check(functions.baton_report(team(1), 99, reports)),
    )
    with pytest.raises(ModelError, match="lacks the instruction set"):
        beyond(some_logits(1), [a_sequence()])
    with pytest.raises(ModelError, match="lacks the instruction set"):
        beyond.logprobs(some_logits(1), [0], [0], [1])


def assert_same_reports(ours: list[Logprob], theirs: list[Logprob]) -> None:
    """Tokens and ranks exactly, log probabilities up to rounding."""
    for own, other in zip(ours, theirs, strict=True):
        assert (own.token_id, own.rank) == (other.token_id, other.rank)
        assert [token for token, _ in own.top] == [token for token, _ in other.top]
        mine = [own.logprob, *(share for _, share in own.top)]
        wanted = [other.logprob, *(share for _, share in other.top)]
        assert mine == pytest.approx(wanted, rel=1e-5, abs=2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", [1, 5, 255, 256, 600, 20_000])
@pytest.mark.parametrize("step", [0.0, 0.5, 100.0], ids=["any", "ties", "all tie"])
def test_log_probabilities_are_those_of_torch(
    choice: ChoiceOf, isa: Isa, vocab: int, step: float
) -> None:
    rng = random.Random(vocab)
    logits = some_logits(40, seed=vocab, vocab=vocab, scale=4.0)
    if step:
        logits = (logits / step).round() * step
    places = [rng.randrange(40) for _ in range(25)]
    targets = [rng.randrange(vocab) for _ in places]
    counts = [rng.choice([0, 1, 5, 20, 200, 10**6]) for _ in places]
    ours = choice(isa).logprobs(logits, places, targets, counts)
    assert_same_reports(ours, torch_logprobs(logits, places, targets, counts))


def test_the_likeliest_that_tie_are_told_lowest_token_first(choice: ChoiceOf) -> None:
    logits = torch.zeros(1, 1000)
    logits[0, [700, 3, 999, 256]] = 1.0
    for logprobs in (choice().logprobs, torch_logprobs):
        (report,) = logprobs(logits, [0], [999], [6])
        assert [token for token, _ in report.top] == [3, 256, 700, 999, 0, 1]
        assert report.rank == 1


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [slice(3, 4), slice(None)], ids=["one", "all"])
def test_logits_that_are_no_numbers_are_reported_as_torch_does(
    choice: ChoiceOf, broken: float, where: slice
) -> None:
    logits = some_logits(2, vocab=700)
    logits[0, where] = broken
    given = ([0, 0, 1], [3, 5, 3], [4, 0, 4])
    assert_same_reports(choice().logprobs(logits, *given), torch_logprobs(logits, *given))


def test_a_target_outside_the_vocabulary_is_refused(choice: ChoiceOf) -> None:
    with pytest.raises(ModelError, match="not in the vocabulary"):
        choice().logprobs(torch.zeros(1, 10), [0], [10], [1])
