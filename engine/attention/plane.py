"""The keys or the values of one layer in the pool, in any of its formats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.attention.contract import KvCache

_LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
_ZERO = 1e-30  # what is no larger counts as zero, as in the compiled backend


@dataclass(frozen=True, slots=True)
class Plane:
    """Reads and writes numbers; knows whether they are scaled."""

    numbers: Tensor  # [blocks, block_size, kv_heads, head_dim]
    scales: Tensor | None  # [blocks, block_size, kv_heads] float32, beside int8, float8

    @classmethod
    def pair(cls, cache: KvCache, layer: int) -> tuple[Plane, Plane]:
        """The keys and the values of a layer."""
        keys, values = cache.scales(layer) or (None, None)
        return cls(cache.keys(layer), keys), cls(cache.values(layer), values)

    @property
    def kv_heads(self) -> int:
        """Heads per token."""
        return self.numbers.shape[2]

    def write(self, slots: tuple[Tensor, Tensor], new: Tensor) -> None:
        """Put `new` [T, kv_heads, head_dim] into these blocks at these offsets, [T] each."""
        if self.scales is None:
            self.numbers[slots] = new
        else:
            self.numbers[slots], self.scales[slots] = quantize(new, self.numbers.dtype)

    def read(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of the blocks [B] as [B, block_size, kv_heads, head_dim]; scaled numbers become
        `dtype`."""
        found = self.numbers.index_select(0, blocks)
        if self.scales is None:
            return found
        if found.dtype is not torch.int8:  # torch does not multiply float8
            found = found.float()
        return (found * self.scales.index_select(0, blocks)[..., None]).to(dtype)


def quantize(x: Tensor, dtype: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """`x` [..., n] as int8 or float8_e4m3fn of the same shape and scales [...] float32, that make
    the largest 127 or 448.

    Rounds as the compiled backend does, ties to even. Not a number, or infinite, becomes zero.
    """
    x = x.float()
    largest = x.abs().amax(-1)
    # Divisions, rounded once: with a number, torch may multiply by a reciprocal (on GPUs it does).
    most = torch.full_like(largest, _LARGEST[dtype])
    inverse = torch.where(largest > _ZERO, most / largest, 0.0)
    scales = torch.where(inverse > 0, largest / most, 0.0)
    scaled = (inverse > 0)[..., None]  # the zeros of the others have no sign
    numbers = torch.where(scaled, x * inverse[..., None], 0.0).nan_to_num_(0.0)
    if dtype is torch.int8:
        numbers.round_()
    return numbers.to(dtype), scales
