"""Launches of norm.py, at the widths of Qwen3-0.6B, Llama-3-8B and odd ones."""

from __future__ import annotations

from functools import partial

import torch

from engine.gpu.kernels.norm import add_rms_norm, rms_norm

_HALF = torch.bfloat16


def _norm(size: int, dtype: torch.dtype, add: bool) -> None:
    x, weight = (torch.empty(n, size, dtype=dtype, device="meta") for n in (7, 1))
    if add:
        add_rms_norm(x, torch.empty_like(x), weight[0], 1e-5)
    else:
        rms_norm(x, weight[0], 1e-5)


WIDE = {
    "plain-1024": partial(_norm, 1024, _HALF, False),
    "plain-4096": partial(_norm, 4096, _HALF, False),
    "add-4096": partial(_norm, 4096, _HALF, True),
    "add-8192": partial(_norm, 8192, torch.float16, True),
}
LAUNCHES = WIDE | {
    "plain-576": partial(_norm, 576, torch.float32, False),
    "add-896": partial(_norm, 896, _HALF, True),
}
