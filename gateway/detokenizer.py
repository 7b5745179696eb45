"""Text from tokens as they come, never half a character.

The text is the continuation of the prompt: a leading space that a tokenizer would drop at the
start of a text is kept. Work per token is constant, whatever was generated before.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers import Tokenizer as Backend

_INCOMPLETE = "\ufffd"
_CONTEXT_TOKENS = 8  # decoders look at neighbours, never further back than this
_MAX_HELD_TOKENS = 16  # a character has at most four bytes: more than this is not a character


class Detokenizer(Protocol):
    """Tokens in, text out, for one sequence."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is still held back, incomplete characters as U+FFFD. Call once, at the end."""
        ...


class ByteDetokenizer:
    """For vocabularies in which every token is a fixed string of bytes (byte-level BPE,
    SentencePiece with byte fallback): an incremental UTF-8 decoder is exact."""

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: frozenset[int]) -> None:
        """`skipped` tokens leave no text."""
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """What is still held back."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other decoder (WordPiece, ...): the text of a small window of tokens with the
    new one, less the text of the window without it."""

    def __init__(self, backend: Backend, skipped: frozenset[int], prompt: Sequence[int]) -> None:
        """`prompt` tokens give the first window its context."""
        self._backend = backend
        self._skipped = skipped
        self._window = [t for t in prompt[-4 * _CONTEXT_TOKENS :] if t not in skipped]
        self._window = self._window[-_CONTEXT_TOKENS:]
        self._done = len(self._window)  # tokens of the window whose text was returned

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        return self._advance(hold=len(self._window) - self._done < _MAX_HELD_TOKENS)

    def flush(self) -> str:
        """What is still held back."""
        return self._advance(hold=False)

    def _advance(self, *, hold: bool) -> str:
        before = self._decode(self._window[: self._done])
        after = self._decode(self._window)
        if hold and after.endswith(_INCOMPLETE):
            return ""
        self._window = self._window[-_CONTEXT_TOKENS:]
        self._done = len(self._window)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False) if ids else ""
