"""Renders chats with the model's own template, sandboxed.

Only the template in the model directory is ever used: callers cannot send one. The environment
follows the conventions that Hugging Face templates are written for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from baton.errors import InvalidRequest, ModelError

MAX_RENDER_SECONDS = 2.0
# Names that the server sets: a caller's template_kwargs must not replace them.
_RESERVED = frozenset({"messages", "add_generation_prompt", "chat_template", "self"})


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant said, for training; here its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class ChatTemplate:
    """A compiled template and the special tokens it may name (`bos_token`, ...)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ModelError when the template does not compile."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"chat template: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        max_chars: int = 4_000_000,
    ) -> str:
        """The prompt text. Raises InvalidRequest when the template refuses the messages, or the
        text grows past `max_chars`, or rendering takes too long."""
        kwargs = dict(template_kwargs or {})
        reserved = sorted(key for key in kwargs if key in _RESERVED or key in self._special_tokens)
        if reserved:
            raise InvalidRequest.of(
                "chat.template_kwargs", f"may not set {', '.join(reserved)}: the server does"
            )
        context = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **kwargs,
        }
        started = time.monotonic()
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(context):
                pieces.append(piece)
                size += len(piece)
                if size > max_chars:
                    raise InvalidRequest.of("chat", f"renders to over {max_chars} characters")
                if time.monotonic() - started > MAX_RENDER_SECONDS:
                    raise InvalidRequest.of("chat", "takes too long to render")
        except InvalidRequest:
            raise
        except Exception as error:
            # A template is a program fed with the caller's data: whatever it raises, from
            # raise_exception() to a TypeError deep inside, says that it cannot take that data.
            raise InvalidRequest.of(
                "chat", f"the model's chat template refused it: {str(error)[:200]}"
            ) from error
        return "".join(pieces)
