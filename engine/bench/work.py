"""How many bytes a pass has to move and how many operations it has to do, by counting.

What is counted is what no implementation can do without: weights are read once per pass, the
output head only where a token is wanted, KV is read once per chunk and written once. Activations
stay in caches and count for nothing, nor do norms and biases. A multiply-add is two operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from engine.ceilings import Precision
from engine.model.config import ModelConfig, read_config
from engine.model.llama import Shape, read_shape

_PRECISIONS: dict[str, Precision] = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "int8": "int8",
    "int4": "int8",
}
_ITEM_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "int8": 1.0,
    "float8_e4m3fn": 1.0,
    "int4": 0.5 + 1 / 32,  # a byte for each group
}
_KV_SCALE_BYTES = {"int8": 4.0, "float8_e4m3fn": 4.0}  # of each head's keys, and of its values


class Part(NamedTuple):
    """One sequence's part of a pass: tokens [start, start + length), of which `rows` have their
    logits computed."""

    start: int
    length: int
    rows: int = 1

    @property
    def end(self) -> int:
        """Positions that have KV after the pass."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass has to do at least."""

    bytes: float
    operations: float


@dataclass(frozen=True, slots=True)
class ModelCount:
    """The numbers of a model that passes cost. Weights are numbers, not bytes."""

    layer_weights: int  # matrices of all layers
    head_weights: int  # the output head, which may be the embedding
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # of each layer; None for full attention
    weights: str  # the format of matrices: float32, bfloat16, int8, or int4 with a head in int8
    kv: str  # the format of the KV cache
    layer_bytes: float | None = None  # of the matrices of all layers with their scales, if known
    head_bytes: float | None = None

    @classmethod
    def of(cls, config: ModelConfig, weights: str, kv: str) -> ModelCount:
        """The count of a Llama, Mistral, Qwen2 or Qwen3. Raises ModelError for any other."""
        shape = read_shape(config)
        return cls(
            layer_weights=config.layers * _layer_weights(shape),
            head_weights=config.vocab_size * shape.hidden,
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            windows=shape.windows,
            weights=weights,
            kv=kv,
        )

    @classmethod
    def at(cls, path: Path, weights: str, kv: str) -> ModelCount:
        """The count of a model directory. Raises ModelError."""
        return cls.of(read_config(path), weights, kv)

    def with_weights(self, weights: str) -> ModelCount:
        """The same model with its matrices in another format."""
        return replace(self, weights=weights)

    def measured(self, layer_bytes: float, head_bytes: float) -> ModelCount:
        """The same model with its matrices as large as they are found to be: those of all layers,
        scales among them, and the output head."""
        return replace(self, layer_bytes=layer_bytes, head_bytes=head_bytes)

    @property
    def precision(self) -> Precision:
        """What its products are computed in."""
        return _PRECISIONS.get(self.weights, "bf16")

    @property
    def weight_bytes(self) -> float:
        """All matrices, the head among them; an embedding apart from the head is not, of which a
        pass reads a row per token."""
        return self._layer_bytes + self._head_bytes

    @property
    def kv_bytes_per_position(self) -> float:
        """Keys and values of one position, over all layers."""
        return len(self.windows) * self._kv_row

    def work(self, parts: Iterable[Part]) -> Work:
        """What a pass over these parts moves and computes."""
        moved, operations, rows = self._layer_bytes, 0.0, 0
        for part in parts:
            rows += part.rows
            operations += 2.0 * part.length * self.layer_weights
            operations += 2.0 * part.rows * self.head_weights
            operations += 4.0 * self.heads * self.head_dim * self._attended(part)
            moved += part.length * self.hidden * _ITEM_BYTES[self.weights]  # embedding
            moved += self._kv_row * self._positions(part)
        if rows:
            moved += self._head_bytes
        return Work(moved, operations)

    @property
    def _layer_bytes(self) -> float:
        if self.layer_bytes is not None:
            return self.layer_bytes
        return self.layer_weights * _ITEM_BYTES[self.weights]

    @property
    def _head_bytes(self) -> float:
        if self.head_bytes is not None:
            return self.head_bytes
        head = "int8" if self.weights == "int4" else self.weights
        return self.head_weights * _ITEM_BYTES[head]

    @property
    def _kv_row(self) -> float:
        """Keys and values of one position in one layer."""
        head = self.head_dim * _ITEM_BYTES[self.kv] + _KV_SCALE_BYTES.get(self.kv, 0.0)
        return 2 * self.kv_heads * head

    def _positions(self, part: Part) -> int:
        """Positions whose KV is read or written, summed over layers: the context that the first
        token sees, and the part's own."""
        return sum(
            part.length + (part.start if window is None else min(part.start, window - 1))
            for window in self.windows
        )

    def _attended(self, part: Part) -> int:
        """Pairs of a token and a position that it attends to, summed over layers."""
        return sum(_pairs(part.end, window) - _pairs(part.start, window) for window in self.windows)


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs among the first `tokens` positions: position p attends to p + 1 of them, or to the
    last `window`."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def _layer_weights(shape: Shape) -> int:
    """Matrices of one layer: queries, keys and values, output, gate and up, down."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.hidden * (queries + 2 * keys) + queries * shape.hidden
    return attention + 3 * shape.hidden * shape.intermediate
