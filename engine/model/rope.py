"""Rotary position embeddings, with the scaling variants that transformers knows.

Inverse frequencies come from transformers' own functions. Two variants depend on how long the
sequence is: dynamic NTK and LongRoPE. There transformers' `generate` rotates a whole prompt by the
prompt's length, and then each new token by the length it makes, while the cache keeps what
was rotated earlier. Token p of a sequence is therefore rotated for length
max(p + 1, prompt length), which needs no state, so chunked prefill, preemption and hand-off give
the same keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from baton.errors import ModelError
from engine.attention.contract import Batch
from engine.model.config import ModelConfig

_LENGTH_DEPENDENT = ("dynamic", "longrope")


def safe_context(config: ModelConfig) -> int:
    """The longest context at which a token's angles depend on its position alone: neither on how
    long the prompt is nor on the rest of its pass."""
    limit = config.max_context
    for rope in _ropes(getattr(config.source, "rope_parameters", None) or {}):
        if rope.get("rope_type") in _LENGTH_DEPENDENT:
            trained = rope.get("original_max_position_embeddings")
            limit = min(limit, trained or config.source.max_position_embeddings)
    return limit


def _ropes(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """RoPE settings, which are nested where kinds of layer differ in them."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    yield from nested or [parameters]


class Rope:
    """Gives each token of a batch its cosines and sines.

    Raises ModelError for an unknown variant and for rotations of only a part of each head.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        parameters = config.rope_parameters
        self._variant = parameters["rope_type"]
        if self._variant != "default" and self._variant not in ROPE_INIT_FUNCTIONS:
            raise ModelError(f"RoPE variant {self._variant!r} is not known")
        self._theta = float(parameters["rope_theta"])
        self._head_dim = head_dim
        self._frequencies, self._scaling = self._frequencies_for(None)
        if len(self._frequencies) * 2 != head_dim:
            raise ModelError("RoPE over a part of each head is not supported here")
        self.fixed = self._variant not in _LENGTH_DEPENDENT  # a position alone says its angles
        self._rows: Callable[[Batch], Tensor] = (
            self._rows_fixed if self.fixed else self._rows_by_length
        )

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin for `layers.rotate`, each [T, 1, head_dim], in the model's dtype."""
        cos, sin = self._waves(batch.positions, self._rows(batch))
        return (
            torch.cat((cos, cos), dim=-1)[:, None].to(self._dtype),
            torch.cat((-sin, sin), dim=-1)[:, None].to(self._dtype),
        )

    def rotations(self, batch: Batch) -> Tensor:
        """Each token's cosines, then its sines: [T, head_dim] float32."""
        return torch.cat(self._waves(batch.positions, self._rows(batch)), dim=-1)

    def table(self, start: int, end: int) -> Tensor:
        """`rotations` of the positions [start, end), where they are `fixed`."""
        assert self.fixed
        positions = torch.arange(start, end, device=self._device)
        return torch.cat(self._waves(positions, self._frequencies), dim=-1)

    def _waves(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [T, head_dim / 2] float32, of positions [T]."""
        angles = positions[:, None].float() * frequencies
        return angles.cos() * self._scaling, angles.sin() * self._scaling

    def _rows_fixed(self, batch: Batch) -> Tensor:
        return self._frequencies

    def _rows_by_length(self, batch: Batch) -> Tensor:
        """Inverse frequencies per token, [T, head_dim / 2]."""
        lengths: list[int] = []
        spans = zip(batch.starts, batch.lengths, batch.prompt_lengths, strict=True)
        for start, length, prompt in spans:
            lengths += [max(position + 1, prompt) for position in range(start, start + length)]
        distinct = sorted(set(lengths))
        rows = torch.stack([self._frequencies_for(length)[0] for length in distinct])
        where = {length: row for row, length in enumerate(distinct)}
        return rows[torch.tensor([where[length] for length in lengths], device=self._device)]

    def _frequencies_for(self, length: int | None) -> tuple[Tensor, float]:
        if self._variant == "default":
            powers = torch.arange(0, self._head_dim, 2, device=self._device).float()
            return 1.0 / self._theta ** (powers / self._head_dim), 1.0
        compute = ROPE_INIT_FUNCTIONS[self._variant]
        frequencies, scaling = compute(self._config, self._device, seq_len=length)
        return frequencies.float(), float(scaling)


class Rotations:
    """A table of rotations, grown as sequences get longer; for variants of RoPE that
    depend on the length of a sequence, one row per token instead."""

    def __init__(self, rope: Rope) -> None:
        self._rope = rope
        self._table: Tensor | None = None

    @property
    def fixed(self) -> bool:
        """Whether a position alone says its rotation."""
        return self._rope.fixed

    def upto(self, positions: int) -> Tensor:
        """The table, of that many positions at least. One that was given out before stays as it
        is, and may be shorter."""
        known = 0 if self._table is None else len(self._table)
        if known < positions:
            more = self._rope.table(known, max(positions, 2 * known))
            self._table = more if self._table is None else torch.cat((self._table, more))
        assert self._table is not None
        return self._table

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rotations, and each token's row of them, [T] int64."""
        if not self.fixed:
            rows = torch.arange(len(batch.token_ids), device=batch.token_ids.device)
            return self._rope.rotations(batch), rows
        ends = map(sum, zip(batch.starts, batch.lengths, strict=True))
        return self.upto(max(ends)), batch.positions
