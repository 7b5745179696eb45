"""The most KV that a batch will hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.forecast import peak_kv

BATCHES = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 40)), max_size=12)


def step_by_step(held: list[int], remaining: list[int]) -> int:
    """The same, counted pass by pass."""
    batch = list(zip(held, remaining, strict=True))
    peak = 0
    for passed in range(max(remaining, default=0) + 1):
        peak = max(peak, sum(now + passed for now, left in batch if left >= passed))
    return peak


@given(BATCHES)
def test_peak_is_what_counting_pass_by_pass_finds(batch: list[tuple[int, int]]) -> None:
    held, remaining = [each[0] for each in batch], [each[1] for each in batch]
    assert peak_kv(held, remaining) == step_by_step(held, remaining)


@given(BATCHES)
def test_peak_is_no_more_than_the_sum_of_all_ends(batch: list[tuple[int, int]]) -> None:
    held, remaining = [each[0] for each in batch], [each[1] for each in batch]
    assert sum(held) <= peak_kv(held, remaining) <= sum(held) + sum(remaining)


def test_sequences_that_end_one_after_another_need_far_less_than_the_sum() -> None:
    assert peak_kv([0] * 10, list(range(100, 1100, 100))) == 3000  # the sum of all ends is 5500


def test_lists_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one remaining length"):
        peak_kv([1], [])
