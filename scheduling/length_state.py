"""What a length predictor has learnt: as arrays, as bytes, and put together from several learners.

Learners exchange through a shared copy: each adds to it what it learnt since it last took it
(`merged`). Weights and counts add up; averages fade by the number of requests learnt from, so
that merging gives what one learner would have got that saw the requests of both, one after the
other.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = 1
_MAGIC = b"BLEN"
_HEAD = struct.Struct("<4sHI")  # magic, format, bytes of the header
_HALF_MAX = 65504.0
_MAX_BODY = 64 * 2**20


class StateError(ValueError):
    """The bytes are not a state that this predictor can go on from."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes and fading of a state; `identity` is of everything else that must be equal for two
    states to speak of the same thing."""

    rows: int
    rank: int
    recalled: int
    tallies: int
    keep: float  # what is left of an average after one more request
    identity: str


@dataclass(slots=True)
class LengthState:
    """`weights` [rows, rank] and `squares` [rows] (the summed squares of their gradients),
    `tallies`, and the prompts known again: `tags` (0: none) with their output `lengths`. `seen`
    counts the sequences learnt from, and so is the version of the data."""

    weights: NDArray[np.float32]
    squares: NDArray[np.float32]
    tallies: NDArray[np.float64]
    tags: NDArray[np.uint16]
    lengths: NDArray[np.uint32]
    seen: int = 0

    @classmethod
    def empty(cls, shape: Shape) -> LengthState:
        """Nothing learnt."""
        return cls(
            weights=np.zeros((shape.rows, shape.rank), np.float32),
            squares=np.zeros(shape.rows, np.float32),
            tallies=np.zeros(shape.tallies),
            tags=np.zeros(shape.recalled, np.uint16),
            lengths=np.zeros(shape.recalled, np.uint32),
        )

    def copy(self) -> LengthState:
        """One that shares nothing with this one."""
        return LengthState(
            self.weights.copy(),
            self.squares.copy(),
            self.tallies.copy(),
            self.tags.copy(),
            self.lengths.copy(),
            self.seen,
        )


def merged(mine: LengthState, base: LengthState, shared: LengthState, keep: float) -> LengthState:
    """`shared` and what `mine` has learnt since it was `base`. Changes none of them."""
    fading = keep ** max(0, mine.seen - base.seen)
    news = (mine.tags != base.tags) | (mine.lengths != base.lengths)
    return LengthState(
        weights=shared.weights + (mine.weights - base.weights),
        squares=np.maximum(0, shared.squares + (mine.squares - base.squares)),
        tallies=np.maximum(0, fading * shared.tallies + (mine.tallies - fading * base.tallies)),
        tags=np.where(news, mine.tags, shared.tags),
        lengths=np.where(news, mine.lengths, shared.lengths),
        seen=shared.seen + mine.seen - base.seen,
    )


def to_bytes(state: LengthState, shape: Shape) -> bytes:
    """Rows that were touched only, in half precision; a few hundred kilobytes at most."""
    rows, known = state.squares > 0, state.tags > 0
    half = np.clip(state.weights[rows], -_HALF_MAX, _HALF_MAX).astype("<f2")
    squares = np.clip(state.squares[rows], 6e-8, _HALF_MAX).astype("<f2")
    body = b"".join(
        part.tobytes()
        for part in (
            np.packbits(rows),
            half,
            squares,
            state.tallies.astype("<f8"),
            np.packbits(known),
            state.tags[known].astype("<u2"),
            state.lengths[known].astype("<u4"),
        )
    )
    header = json.dumps({"identity": shape.identity, "seen": state.seen, "bytes": len(body)})
    return _HEAD.pack(_MAGIC, FORMAT, len(header)) + header.encode() + zlib.compress(body, 1)


def from_bytes(data: bytes, shape: Shape) -> LengthState:
    """The state that `to_bytes` wrote. Raises StateError for anything else, another format, or
    the state of a predictor that was set up differently."""
    try:
        header, body = _opened(data)
        if header["identity"] != shape.identity:
            raise StateError("the state is of a predictor that is set up differently")
        reader = _Reader(body)
        state = LengthState.empty(shape)
        rows = reader.bits(shape.rows)
        count = int(rows.sum())
        state.weights[rows] = reader.take("<f2", count * shape.rank).reshape(count, shape.rank)
        state.squares[rows] = reader.take("<f2", count)
        state.tallies[:] = reader.take("<f8", shape.tallies)
        known = reader.bits(shape.recalled)
        count = int(known.sum())
        state.tags[known] = reader.take("<u2", count)
        state.lengths[known] = reader.take("<u4", count)
        state.seen = int(header["seen"])
    except StateError:
        raise
    except (
        *(KeyError, TypeError, ValueError, OverflowError, RecursionError),
        *(struct.error, zlib.error),
    ) as error:
        raise StateError(f"the state is damaged: {error}") from error
    floats = (state.weights, state.squares, state.tallies)
    sound = all(np.isfinite(part).all() for part in floats)
    sound = sound and all((part >= 0).all() for part in (state.squares, state.tallies))
    if reader.rest or state.seen < 0 or not sound:
        raise StateError("the state is damaged")
    return state


def _opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    magic, format_, size = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        raise StateError("not the state of a length predictor")
    if format_ != FORMAT:
        raise StateError(f"the state has format {format_}, this is format {FORMAT}")
    header = json.loads(data[_HEAD.size : _HEAD.size + size])
    unpacker = zlib.decompressobj()
    body = unpacker.decompress(data[_HEAD.size + size :], _MAX_BODY)
    if not unpacker.eof or len(body) != header["bytes"]:
        raise StateError("the state is damaged: it has another size than it says")
    return header, body


class _Reader:
    """Takes arrays off the front of a body."""

    def __init__(self, body: bytes) -> None:
        self.rest = body

    def take(self, kind: str, count: int) -> NDArray[Any]:
        size = count * np.dtype(kind).itemsize
        if len(self.rest) < size:
            raise StateError("the state is cut off")
        taken, self.rest = self.rest[:size], self.rest[size:]
        return np.frombuffer(taken, kind)

    def bits(self, count: int) -> NDArray[np.bool_]:
        packed = self.take("u1", -(-count // 8))
        return np.unpackbits(packed, count=count).astype(bool)
