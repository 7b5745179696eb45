from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types import Request, Sampling, Stopping
from scheduling.budget import batching, prefill_first, splitfuse
from scheduling.sequence import Sequence


def prompt(length: int, computed: int = 0) -> Sequence:
    request = Request(f"p{length}", tuple(range(length)), Sampling(), Stopping(8))
    sequence = Sequence.start(request, 0, now=0.0)
    sequence.computed = computed
    return sequence


def generating() -> Sequence:
    sequence = prompt(3, computed=3)
    sequence.append(5)
    assert sequence.generating
    return sequence


def test_a_long_prompt_is_split_and_samples_only_at_its_end() -> None:
    sequence = prompt(10)
    cuts = []
    while sequence.uncomputed:
        (chunk,) = splitfuse([], [sequence], 4)
        cuts.append((chunk.start, chunk.length, chunk.sample))
        sequence.computed += chunk.length
    assert cuts == [(0, 4, False), (4, 4, False), (8, 2, True)]


def test_short_prompts_are_fused_until_the_pass_is_exactly_full() -> None:
    chunks = splitfuse([], [prompt(3), prompt(4), prompt(9), prompt(2)], 10)
    assert [(c.length, c.sample) for c in chunks] == [(3, True), (4, True), (3, False)]


def test_generation_comes_before_prompts() -> None:
    chunks = splitfuse([generating(), generating()], [prompt(9)], 6)
    assert [(c.length, c.sample) for c in chunks] == [(1, True), (1, True), (4, False)]


def test_nothing_to_do_is_an_empty_pass() -> None:
    assert splitfuse([], [], 4) == ()


def test_whole_prompts_go_first_and_generation_waits() -> None:
    chunks = prefill_first([generating()], [prompt(3), prompt(4), prompt(9), prompt(2)], 10)
    assert [(c.length, c.sample) for c in chunks] == [(3, True), (4, True)]


def test_a_prompt_longer_than_the_budget_is_not_split() -> None:
    chunks = prefill_first([generating()], [prompt(30), prompt(2)], 10)
    assert [(c.length, c.sample) for c in chunks] == [(30, True)]


def test_generation_goes_on_when_no_prompt_is_there() -> None:
    chunks = prefill_first([generating(), generating()], [], 10)
    assert [(c.length, c.sample) for c in chunks] == [(1, True), (1, True)]


def test_both_rules_have_names() -> None:
    assert batching("splitfuse") is splitfuse
    assert batching("prefill-first") is prefill_first


@settings(max_examples=200, deadline=None)
@given(
    generations=st.integers(0, 6),
    prompts=st.lists(st.integers(1, 20), max_size=6),
    max_tokens=st.integers(1, 30),
)
def test_the_budget_is_met_exactly_or_everything_fits(
    generations: int, prompts: list[int], max_tokens: int
) -> None:
    chunks = splitfuse(
        [generating() for _ in range(generations)], [prompt(n) for n in prompts], max_tokens
    )
    tokens = sum(c.length for c in chunks)
    assert tokens == min(max_tokens, generations + sum(prompts))
    assert all(c.length > 0 for c in chunks)
    assert sum(c.sequence.generating for c in chunks) == min(generations, max_tokens)
    assert sum(not c.sample for c in chunks) <= 1
