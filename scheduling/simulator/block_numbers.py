"""What a recorded run keeps of the contents of KV blocks: numbers, the same for the same prefix.

A prefix cache decides by whether two prefixes are equal, so that is all that a replay must know.
In a replay the last token of each block is the number of its key, and stands for the key.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from baton.prefix import block_keys, salt_of
from baton.types import Request
from scheduling.sequence import Sequence

FIRST_NUMBER = 2
"""Those below are the tokens of a replay that stand for nothing (record.GOES_ON and STOPS)."""


class BlockNumbers:
    """Numbers the keys of one run, in the order in which they come up."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._numbers: dict[bytes, int] = {}

    def of_prompt(self, request: Request) -> tuple[int, ...]:
        """Those of the full blocks of the prompt."""
        return self._of(request, request.prompt_ids)

    def of_priors(self, request: Request) -> tuple[tuple[int, ...], ...]:
        """For each sequence those of the blocks that end in what earlier attempts generated."""
        whole, prompt = len(request.prompt_ids) // self._block_size, request.prompt_ids
        return tuple(
            self._of(request, (*prompt, *prior.token_ids))[whole:]
            for prior in request.prior_outputs
        )

    def of_next(self, sequence: Sequence, token_id: int) -> int | None:
        """That of the block which the sequence's next token fills; None if it fills none."""
        size = self._block_size
        if (len(sequence.tokens) + 1) % size or sequence.request.bypass_cache:
            return None
        begun = len(sequence.keys) * size
        last = sequence.keys[-1] if begun else _salt(sequence.request)
        return self._number(block_keys([*sequence.tokens[begun:], token_id], size, last)[-1])

    def _of(self, request: Request, tokens: Items[int]) -> tuple[int, ...]:
        if request.bypass_cache:
            return ()
        return tuple(map(self._number, block_keys(tokens, self._block_size, _salt(request))))

    def _number(self, key: bytes) -> int:
        return self._numbers.setdefault(key, FIRST_NUMBER + len(self._numbers))


def numbered(
    tokens: int, numbers: Items[int], block_size: int, *, start: int = 0, filler: int = 0
) -> tuple[int, ...]:
    """`tokens` tokens from position `start` of a sequence on, for a replay: `filler`, but the
    numbers at the ends of the blocks that end there."""
    ids = [filler] * tokens
    ends = range(block_size - 1 - start % block_size, tokens, block_size)
    for end, number in zip(ends, numbers, strict=False):
        ids[end] = number
    return tuple(ids)


def replayed_keys(token_ids: Items[int], block_size: int, salt: bytes) -> list[bytes]:
    """As `baton.prefix.block_keys`, for the tokens of a replay."""
    ends = token_ids[block_size - 1 :: block_size]
    return [number.to_bytes(8, "little") for number in ends]


def _salt(request: Request) -> bytes:
    return salt_of(request.tenant, request.cache_salt)
