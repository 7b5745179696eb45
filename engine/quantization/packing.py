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


def unpack(words: Tensor, bits: int, codes: range) -> Tensor:
    """Those codes of each row of `words` [rows, n] int32, as [rows, len(codes)] uint8."""
    whole = _whole(codes, bits)
    found = words[:, whole.start * bits // WORD : whole.stop * bits // WORD]
    # Little-endian, as every machine that runs this.
    found = found.contiguous().view(torch.uint8)
    if bits == 4:
        found = torch.stack((found & 15, found >> 4), -1).flatten(-2)
    return found[:, codes.start - whole.start :][:, : len(codes)]


def unpack_awq(words: Tensor, codes: range) -> Tensor:
    """The same where AWQ has packed four bits."""
    whole = _whole(codes, 4)
    found = _reordered(unpack(words, 4, whole), _AWQ_PLACES)
    return found[:, codes.start - whole.start :][:, : len(codes)]


def pack(codes: Tensor, bits: int) -> Tensor:
    """The inverse: codes [rows, count] uint8 as [rows, words] int32, the last filled up with 0."""
    padding = -codes.shape[1] % (WORD // bits)
    codes = torch.nn.functional.pad(codes, (0, padding))
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes.contiguous().view(torch.int32)


def to_awq(codes: Tensor) -> Tensor:
    """Columns in the order in which AWQ packs them."""
    return _reordered(codes, _AWQ_ORDER)


def words(count: int, bits: int) -> int:
    """Words that so many codes take."""
    return -(-count * bits // WORD)


def _whole(codes: range, bits: int) -> range:
    """Codes that fill whole words, these among them."""
    per_word = WORD // bits
    return range(codes.start // per_word * per_word, -(-codes.stop // per_word) * per_word)


def _reordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    places = torch.tensor(order, device=codes.device)
    return codes.reshape(len(codes), -1, len(order)).index_select(2, places).flatten(1)
