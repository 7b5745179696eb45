"""Launches of blocks.py, for blocks of Llama-3-8B."""

from __future__ import annotations

import torch

from engine.gpu.kernels import blocks

_STORAGE = torch.empty(64, 32, 2, 16, 8, 128, dtype=torch.bfloat16, device="meta")
_NUMBERS = torch.empty(5, dtype=torch.int64, device="meta")

WIDE = {
    "gather": lambda: blocks.gather(_STORAGE, _NUMBERS, torch.empty_like(_STORAGE[:5])),
    "scatter": lambda: blocks.scatter(_NUMBERS, torch.empty_like(_STORAGE[:5]), _STORAGE),
}
LAUNCHES = WIDE | {"clear": lambda: blocks.clear(_STORAGE, _NUMBERS)}
