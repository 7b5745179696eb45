"""Classes of output lengths: what the length predictors choose between."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Buckets:
    """`edges` are the longest lengths of each bucket, ascending. Bucket 0 begins at 1 token; what
    is longer than the last edge counts as the last bucket."""

    edges: tuple[int, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.edges, self.edges[1:], strict=False))
        if not self.edges or self.edges[0] < 1 or not ascending:
            raise ValueError("edges must be positive and ascending")

    def __len__(self) -> int:
        return len(self.edges)

    @classmethod
    def geometric(cls, longest: int, *, first: int = 8, ratio: float = 1.5) -> Buckets:
        """Each about `ratio` times as wide as the one before: as fine for short outputs as for
        long ones, in proportion. The last ends at `longest`."""
        edges, edge = [], float(first)
        while round(edge) < longest:
            edges.append(round(edge))
            edge = max(edge * ratio, edge + 1)
        return cls((*edges, max(1, longest)))

    @classmethod
    def equal_width(cls, longest: int, count: int = 10) -> Buckets:
        """S3's classes: `count` of the same width (section 4.1)."""
        edges = (max(1, round(longest * (i + 1) / count)) for i in range(count))
        return cls(tuple(dict.fromkeys(edges)))

    def of(self, tokens: int) -> int:
        """The bucket of a length."""
        return min(bisect_left(self.edges, tokens), len(self.edges) - 1)

    def middle(self, bucket: int) -> float:
        """Half-way between a bucket's ends."""
        lowest = self.edges[bucket - 1] + 1 if bucket else 1
        return (lowest + self.edges[bucket]) / 2
