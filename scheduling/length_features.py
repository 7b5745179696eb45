"""A prompt as hashed features: which token ids and pairs of neighbours it has, and how long it is.

The hashes are salted, and many n-grams share a row: from the weights alone nobody reads a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ENDS = 128
"""Tokens looked at from each end of a long prompt."""

SIZE_ROWS = 64
"""Rows that tell sizes: of the prompt, and `max_tokens`, by powers of two."""

_SIZE_VALUE = 0.5
_A, _B, _C = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


@dataclass(frozen=True, slots=True)
class Features:
    """Distinct `rows` of a weight table with their `values`, and `identity`, a hash of the prompt
    by which it is known again."""

    rows: NDArray[np.int64]
    values: NDArray[np.float32]
    identity: int


class FeatureHasher:
    """Turns prompts into features; `rows` counts those of n-grams, `SIZE_ROWS` follow them."""

    def __init__(self, rows: int, salt: str) -> None:
        self._rows = np.uint64(rows)
        self._size_row = rows
        digest = hashlib.blake2b(salt.encode(), digest_size=8, person=b"baton-len").digest()
        self._salt = np.uint64(int.from_bytes(digest, "little"))

    def features(self, prompt_ids: Sequence[int], max_tokens: int) -> Features:
        """Features of a prompt, which has at least one token."""
        count = len(prompt_ids)
        if count > 2 * ENDS:
            prompt_ids = (*prompt_ids[:ENDS], *prompt_ids[-ENDS:])
        ids = np.fromiter(prompt_ids, np.uint64, len(prompt_ids))
        single = _mixed((ids + self._salt) * _A)
        pairs = _mixed(single[:-1] * _C + single[1:])
        grams = np.unique(np.concatenate((single, pairs)) % self._rows)
        rows = np.empty(len(grams) + 2, np.int64)
        rows[:-2] = grams
        rows[-2] = self._size_row + _power(count)
        rows[-1] = self._size_row + SIZE_ROWS // 2 + _power(max_tokens)
        values = np.full(len(rows), len(grams) ** -0.5, np.float32)
        values[-2:] = _SIZE_VALUE
        places = np.arange(1, len(ids) + 1, dtype=np.uint64)
        whole = int(np.bitwise_xor.reduce(_mixed(single + places * _B)))
        return Features(rows, values, whole ^ count)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each output bit depends on all input bits."""
    x = x ^ (x >> np.uint64(31))
    x = x * _B
    return x ^ (x >> np.uint64(29))


def _power(number: int) -> int:
    return min(number.bit_length(), SIZE_ROWS // 2 - 1)
