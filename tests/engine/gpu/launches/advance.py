"""Launches of advance.py."""

from __future__ import annotations

import torch

from engine.gpu.kernels.advance import advance


def _advance(table: torch.dtype) -> None:
    def column(dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(5, dtype=dtype, device="meta")

    advance(
        column(),
        token_ids=column(),
        positions=column(),
        contexts=column(torch.int32),
        slots=column(),
        block_tables=torch.empty(5, 77, dtype=table, device="meta"),
        limits=column(torch.int32),
        block_size=16,
    )


LAUNCHES = {"int32": lambda: _advance(torch.int32), "int64": lambda: _advance(torch.int64)}
