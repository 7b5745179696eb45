"""Launches of activation.py, at Llama-3-8B's width and at that of a 135M Llama."""

from __future__ import annotations

from functools import partial

import torch

from engine.gpu.kernels.activation import gated


def _gated(size: int, kind: str, dtype: torch.dtype) -> None:
    gated(torch.empty(3, 2 * size, dtype=dtype, device="meta"), kind)


WIDE = {
    "silu-14336": partial(_gated, 14336, "silu", torch.bfloat16),
    "gelu-14336": partial(_gated, 14336, "gelu", torch.bfloat16),
}
LAUNCHES = WIDE | {
    "gelu-tanh-1536": partial(_gated, 1536, "gelu_tanh", torch.float16),
    "relu-1536": partial(_gated, 1536, "relu", torch.float32),
}
