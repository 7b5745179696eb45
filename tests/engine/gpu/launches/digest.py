"""Launches of digest.py, for blocks of Llama-3-8B."""

from __future__ import annotations

import torch

from engine.gpu.kernels import digest

_STORAGE = torch.empty(64, 32, 2, 16, 8, 128, dtype=torch.bfloat16, device="meta")
_NUMBERS = torch.empty(5, dtype=torch.int64, device="meta")

WIDE = {
    "transfer": lambda: digest.transfer(_STORAGE, _NUMBERS, _STORAGE, _NUMBERS, 3),
}
LAUNCHES = WIDE | {"digests": lambda: digest.digests(_STORAGE, _NUMBERS, 3)}
