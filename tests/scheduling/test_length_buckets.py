"""Buckets of output lengths."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.length_buckets import Buckets


@given(longest=st.integers(1, 200_000), tokens=st.integers(1, 250_000))
def test_a_length_lies_within_its_bucket(longest: int, tokens: int) -> None:
    for buckets in (Buckets.geometric(longest), Buckets.equal_width(longest)):
        index = buckets.of(tokens)
        below = buckets.edges[index - 1] if index else 0
        assert below < tokens
        assert tokens <= buckets.edges[index] or index == len(buckets) - 1
        assert below < buckets.middle(index) <= buckets.edges[index]


def test_geometric_buckets_grow_in_proportion_and_end_at_the_longest() -> None:
    edges = Buckets.geometric(8192).edges
    assert edges[0] == 8
    assert edges[-1] == 8192
    assert len(edges) < 20
    assert all(b / a < 1.7 for a, b in pairwise(edges))


def test_equal_width_buckets_are_those_of_s3() -> None:
    assert Buckets.equal_width(2048).edges[:3] == (205, 410, 614)
    assert len(Buckets.equal_width(2048)) == 10
    assert Buckets.equal_width(3).edges == (1, 2, 3)


@pytest.mark.parametrize("edges", [(), (0, 4), (4, 4), (8, 4)])
def test_edges_that_do_not_ascend_are_refused(edges: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        Buckets(edges)
