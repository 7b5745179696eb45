"""A directory with a classifier of output lengths, and how its process is spoken to.

The directory is a transformers model for sequence classification, with `baton_lengths.json`
beside it: `{"edges": [16, 32, ...]}`, the longest length of each class. The process
(`python -m engine.length_classifier DIR`) first says what it is, then answers texts with the
probabilities of the classes, each message a frame: four bytes of length, then JSON.

    child:  {"edges": [16, 32, ...]}
    parent: {"id": 7, "text": "..."}
    child:  {"id": 7, "probabilities": [0.1, ...]}
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from baton.errors import ModelError

FILE = "baton_lengths.json"
MAX_FRAME = 1 << 20
CLIPPED = 2000
"""Characters of a long text that are looked at, from each end."""

_LENGTH = struct.Struct("<I")

Message = dict[str, Any]


def read_edges(directory: Path) -> tuple[int, ...]:
    """The longest length of each class. Raises ModelError."""
    path = directory / FILE
    try:
        edges = json.loads(path.read_text())["edges"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: not the buckets of a length classifier: {error}") from error
    numbers = isinstance(edges, list) and all(type(edge) is int for edge in edges)
    if not numbers or not edges or edges[0] < 1 or edges != sorted(set(edges)):
        raise ModelError(f"{path}: edges must be positive and ascending")
    return tuple(edges)


def write_edges(directory: Path, edges: tuple[int, ...]) -> None:
    """Name the classes of the model in `directory`."""
    (directory / FILE).write_text(json.dumps({"edges": list(edges)}) + "\n")


def clipped(text: str) -> str:
    """What a classifier looks at: all of a short text, both ends of a long one."""
    return text if len(text) <= 2 * CLIPPED else f"{text[:CLIPPED]}\n{text[-CLIPPED:]}"


def frame(message: Message) -> bytes:
    """A message as it is sent."""
    body = json.dumps(message).encode()
    return _LENGTH.pack(len(body)) + body


def unframe(buffer: bytearray) -> list[Message]:
    """Take the complete messages off the front of `buffer`. Raises ValueError if it holds
    anything else."""
    messages = []
    while len(buffer) >= _LENGTH.size:
        (size,) = _LENGTH.unpack_from(buffer)
        if size > MAX_FRAME:
            raise ValueError("a frame is too long")
        end = _LENGTH.size + size
        if len(buffer) < end:
            break
        message = json.loads(bytes(buffer[_LENGTH.size : end]))
        if not isinstance(message, dict):
            raise ValueError("a frame is not an object")
        messages.append(message)
        del buffer[:end]
    return messages
