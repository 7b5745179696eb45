"""Which share of a model its code computes here: all of it, or that of one rank among several.

The layers know nothing of ranks. They ask for narrower weights, and call `reduce` where what they
have computed is one term of a sum (engine/parallel/shard.py).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch.nn import functional as F


class Part(Protocol):
    """A share: contiguous layers, and of each of them some heads and columns."""

    @property
    def first(self) -> bool:
        """Whether it begins with the embedding."""
        ...

    @property
    def last(self) -> bool:
        """Whether it ends with the norm and the head."""
        ...

    def layers(self, total: int) -> range:
        """Which of the model's layers."""
        ...

    def share(self, count: int) -> int:
        """How many of `count` query heads, or columns of the MLP."""
        ...

    def kv_heads(self, count: int) -> int:
        """How many of `count` key heads."""
        ...

    def vocabulary(self, size: int) -> int:
        """How many rows of the embedding and of the head; the last ones may be padding."""
        ...

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """[T, hidden], complete, from the rows that are here."""
        ...

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over those who have other heads or columns of the same layer; may be
        made in place. To be called after each projection back to the residual stream."""
        ...


class Whole:
    """The Part that is everything."""

    first = last = True

    def layers(self, total: int) -> range:
        """All."""
        return range(total)

    def share(self, count: int) -> int:
        """All."""
        return count

    def kv_heads(self, count: int) -> int:
        """All."""
        return count

    def vocabulary(self, size: int) -> int:
        """All."""
        return size

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """[T, hidden]."""
        return F.embedding(token_ids, weight)

    def reduce(self, x: Tensor) -> Tensor:
        """`x` is the sum."""
        return x


WHOLE = Whole()
