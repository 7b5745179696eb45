"""How integers are packed into the 32-bit words of checkpoints.

All formats have the first integer in the lowest bits; they differ in the axis that is packed, and
AWQ in which integer is the first (its order suits a way of unpacking two halves at once).
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32
# Where AWQ's nibbles 0, 1, ... of a word come from, and where inputs 0, 1, ... went.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row of `words` [rows, n] int32, as [rows, count] uint8."""
    found = words.contiguous().view(torch.uint8)  # little-endian, as every machine that runs this
    if bits == 4:
        found = torch.stack((found & 15, found >> 4), -1).flatten(-2)
    return found[:, :count]


def pack(codes: Tensor, bits: int) -> Tensor:
    """The inverse: codes [rows, count] uint8 as [rows, words] int32, the last filled up with 0."""
    padding = -codes.shape[1] % (WORD // bits)
    codes = torch.nn.functional.pad(codes, (0, padding))
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes.contiguous().view(torch.int32)


def from_awq(codes: Tensor) -> Tensor:
    """Columns [rows, 8 n], unpacked as they came, in their true order."""
    return _reordered(codes, _AWQ_PLACES)


def to_awq(codes: Tensor) -> Tensor:
    """Columns in the order in which AWQ packs them."""
    return _reordered(codes, _AWQ_ORDER)


def words(count: int, bits: int) -> int:
    """Words that so many codes take."""
    return -(-count * bits // WORD)


def _reordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    places = torch.tensor(order, device=codes.device)
    return codes.reshape(len(codes), -1, len(order)).index_select(2, places).flatten(1)
