"""Counter-based random numbers: a pure function of a key and a counter, with no state to carry.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3"
(SC 2011), in torch integer operations, so that it runs wherever the logits are. Knows nothing of
requests or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor, Tensor, Tensor]  # 32-bit words in int64 tensors, to be broadcast

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four random words for each counter, as int64 tensors of values below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(
    seeds: Items[int], streams: Items[int], positions: Items[int], count: int, device: torch.device
) -> Tensor:
    """`count` numbers in the open interval (0, 1) per row: [rows, count] float64.

    Row r depends on the 64-bit `seeds[r]`, `streams[r]` and `positions[r]` only, and its first
    numbers do not depend on `count`.
    """

    def column(values: Items[int]) -> Tensor:
        return torch.tensor([v & _MASK for v in values], dtype=torch.int64, device=device)[:, None]

    lanes = torch.arange(-(-count // 4), dtype=torch.int64, device=device)[None, :]
    zero = torch.zeros_like(lanes)
    key = (column(seeds), column([seed >> 32 for seed in seeds]))
    words = philox4x32((lanes, column(streams), column(positions), zero), key)
    bits = torch.stack(words, dim=-1).flatten(1)[:, :count]  # [rows, count]
    return (bits.double() + 0.5) / 2.0**32


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps, the mask undoes the sign."""
    product = word * multiplier
    return (product >> 32) & _MASK, product & _MASK
