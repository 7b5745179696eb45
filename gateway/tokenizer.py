"""The model's own fast tokenizer, as transformers would use it, without transformers."""

from __future__ import annotations

import asyncio
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from baton.errors import ModelError
from gateway.chat_template import ChatTemplate
from gateway.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from gateway.model_files import read_json

# Longer texts are encoded in a thread (the library releases the GIL): 16 KiB takes about 5 ms.
INLINE_CHARS = 16 * 1024

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text to ids and back. Safe to use from several threads."""

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str] | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.template = template
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added = {i: token.content for i, token in added.items()}
        self._byte_decoding = _ByteDecoding.of(backend)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template. Raises ModelError."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{directory}: no tokenizer.json: only fast tokenizers are served")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception for a bad file
            raise ModelError(f"{path}: {error}") from error
        config = read_json(directory / "tokenizer_config.json") or {}
        special_tokens = _special_tokens(config)
        _complete(backend, config, special_tokens)
        source = _template_source(directory, config)
        template = ChatTemplate(source, special_tokens) if source else None
        return cls(backend, special_tokens, template)

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text; the model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; the model's own beginning and end marks are added unless told not to."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    async def encode_async(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """`encode` that never holds up the event loop for long."""
        if len(text) <= INLINE_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        call = functools.partial(self.encode, text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(call)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids without a token leave none."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; not always valid UTF-8 on their own."""
        token = self._added.get(token_id)
        if token is not None:
            return self._byte_decoding.added(token)
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._byte_decoding.plain(token)

    def detokenizer(self, prompt: Sequence[int], *, skip_special_tokens: bool) -> Detokenizer:
        """A detokenizer for one continuation of `prompt`."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        if self._byte_decoding.exact:
            return ByteDetokenizer(self.token_bytes, skipped)
        return WindowDetokenizer(self._backend, skipped, prompt)


class _ByteDecoding:
    """How this vocabulary writes bytes, read off its decoder."""

    def __init__(self, *, byte_level: bool, byte_fallback: bool, space: str, exact: bool) -> None:
        self._byte_level, self._byte_fallback, self._space = byte_level, byte_fallback, space
        self.exact = exact  # every token is a fixed string of bytes

    @classmethod
    def of(cls, backend: Backend) -> _ByteDecoding:
        decoder = json.loads(backend.to_str())["decoder"] or {}
        steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        kinds = {step.get("type") for step in steps}
        space = ""
        for step in steps:
            if step.get("type") == "Metaspace":
                space = step["replacement"]
            elif step.get("type") == "Replace" and step.get("content") == " ":
                space = step["pattern"].get("String", "")
        known = {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
        return cls(
            byte_level="ByteLevel" in kinds,
            byte_fallback="ByteFallback" in kinds,
            space=space,
            exact=kinds <= known and ("ByteLevel" in kinds or bool(space)),
        )

    def plain(self, token: str) -> bytes:
        if self._byte_level:
            return _from_byte_level(token)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self._space:
            token = token.replace(self._space, " ")
        return token.encode()

    def added(self, token: str) -> bytes:
        return _from_byte_level(token) if self._byte_level else self.plain(token)


def _from_byte_level(token: str) -> bytes:
    """A token that holds a character outside the byte alphabet stands for itself."""
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[char] for char in token])
    except KeyError:
        return token.encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE (GPT-2) writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Named special tokens of tokenizer_config.json: plain strings, or objects with `content`."""
    found = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _complete(backend: Backend, config: dict[str, Any], special_tokens: Mapping[str, str]) -> None:
    """Add the tokens that only tokenizer_config.json knows. Its `add_bos_token` says nothing when
    there is a tokenizer.json, as in transformers: the file's post-processor decides."""
    backend.no_truncation()
    backend.no_padding()
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    for _, fields in sorted(listed.items(), key=lambda item: int(item[0])):
        if fields["content"] not in known:
            backend.add_tokens([AddedToken(**fields)])
            known.add(fields["content"])
    for token in special_tokens.values():
        if token not in known:
            backend.add_special_tokens([AddedToken(token, special=True)])
            known.add(token)


def _template_source(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else the (default) template of tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        by_name = {entry["name"]: entry["template"] for entry in template}
        template = by_name.get("default")
    return template if isinstance(template, str) else None
