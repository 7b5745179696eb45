"""The one attention contract: a ragged batch of (sequence, start, length) over paged KV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One pass, flattened: the tokens of all chunks one after another, in plan order.

    T tokens in all, S sequences. Chunk s covers positions
    [starts[s], starts[s] + lengths[s]) of its sequence and attends to positions
    [0, starts[s] + lengths[s]), causally.
    """

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64: block * block_size + offset, where each token's KV goes
    starts: tuple[int, ...]  # [S]
    lengths: tuple[int, ...]  # [S]
    block_tables: Tensor  # [S, B] int64, in order of position; rows end in repeats of their last
    prompt_lengths: tuple[int, ...]  # [S]: dynamic RoPE scales by max(position + 1, prompt length)
    logit_rows: Tensor  # [R] int64: rows of the flat batch whose logits are wanted
    whole_rows: int  # of the first so many all logits are, of the others only the largest


class KvCache(Protocol):
    """The paged pool as attention sees it. NHD blocks, block-major: [blocks, layers, 2] planes of
    [block_size, kv_heads, head_dim], which in int8 and float8 are followed by float32 scales
    [block_size, kv_heads], symmetric: a number is what is stored times its token and head's."""

    block_size: int

    def keys(self, layer: int) -> Tensor:
        """[blocks, block_size, kv_heads, head_dim] view of one layer's keys."""
        ...

    def values(self, layer: int) -> Tensor:
        """[blocks, block_size, kv_heads, head_dim] view of one layer's values."""
        ...

    def scales(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """[blocks, block_size, kv_heads] views of the scales of one layer's keys and values; None
        if they are not scaled."""
        ...


class AttentionBackend(Protocol):
    """Writes the pass's keys and values into the pool, then attends over it."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        cache: KvCache,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal attention of every chunk over its own sequence.

        q [T, heads, head_dim]; k, v [T, kv_heads, head_dim], rotated already. `window` w lets
        position p see [p - w + 1, p]. Returns [T, heads, head_dim] in q's dtype.
        """
        ...
