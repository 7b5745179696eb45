"""Prompt text and chats to token ids, within bounds. Generate and Tokenize share it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict, SerializeToJsonError
from google.protobuf.struct_pb2 import Struct

from baton.errors import InvalidRequest, Violation
from baton.v1.generation_pb2 import ChatInput
from gateway.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
MAX_MESSAGES = 4096


class PromptEncoder:
    """Raises InvalidRequest for everything the caller can get wrong."""

    def __init__(self, tokenizer: Tokenizer, max_bytes: int) -> None:
        """`max_bytes` bounds a text, a chat and a rendered chat."""
        self._tokenizer = tokenizer
        self._max_bytes = max_bytes

    async def text(self, text: str, field: str = "prompt") -> list[int]:
        """Ids of a raw text, with the model's beginning mark."""
        if not text:
            raise InvalidRequest.of(field, "must not be empty")
        self._check_size(field, [text])
        ids = await self._tokenizer.encode_async(text)
        if not ids:
            raise InvalidRequest.of(field, "has no tokens")
        return ids

    async def chat(self, chat: ChatInput) -> list[int]:
        """Ids of a chat rendered with the model's template, which sets all marks itself."""
        template = self._tokenizer.template
        if template is None:
            raise InvalidRequest.of("chat", "the model has no chat template")
        messages = self._messages(chat)
        wants_prompt = chat.add_generation_prompt or not chat.HasField("add_generation_prompt")
        text = await asyncio.to_thread(
            template.render,
            messages,
            add_generation_prompt=wants_prompt,
            template_kwargs=_plain(chat.template_kwargs, "chat.template_kwargs"),
            max_chars=self._max_bytes,
        )
        if not text:
            raise InvalidRequest.of("chat", "renders to nothing")
        return await self._tokenizer.encode_async(text, add_special_tokens=False)

    def _messages(self, chat: ChatInput) -> list[Mapping[str, Any]]:
        if not chat.messages:
            raise InvalidRequest.of("chat.messages", "must not be empty")
        if len(chat.messages) > MAX_MESSAGES:
            raise InvalidRequest.of("chat.messages", f"at most {MAX_MESSAGES} are allowed")
        bad = [
            Violation(f"chat.messages[{i}].role", f"must be one of {', '.join(ROLES)}")
            for i, message in enumerate(chat.messages)
            if message.role not in ROLES
        ]
        if bad:
            raise InvalidRequest(bad)
        self._check_size("chat.messages", [message.content for message in chat.messages])
        return [
            {
                **_plain(message.extra, f"chat.messages[{i}].extra"),
                "role": message.role,
                "content": message.content,
            }
            for i, message in enumerate(chat.messages)
        ]

    def _check_size(self, field: str, texts: Sequence[str]) -> None:
        # A character has at least one byte: most long texts are refused without encoding them.
        size = sum(map(len, texts))
        if size <= self._max_bytes:
            size = sum(len(text.encode()) for text in texts)
        if size > self._max_bytes:
            raise InvalidRequest.of(field, f"is over {self._max_bytes} bytes")


def _plain(struct: Struct, field: str) -> dict[str, Any]:
    """A Struct as JSON would have it: its numbers are doubles, whole ones become ints."""
    try:
        values = MessageToDict(struct)
    except (SerializeToJsonError, ValueError) as error:  # NaN and infinities
        raise InvalidRequest.of(field, f"is not JSON: {error}") from error
    return {key: _whole(value) for key, value in values.items()}


def _whole(value: Any) -> Any:
    match value:
        case float() if value.is_integer():
            return int(value)
        case dict():
            return {key: _whole(item) for key, item in value.items()}
        case list():
            return [_whole(item) for item in value]
        case _:
            return value
