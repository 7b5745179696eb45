"""Launches of adjust.py, at Llama-3's vocabulary."""

from __future__ import annotations

from functools import partial

import torch

from engine.gpu.kernels.adjust import Tables, adjust, note


def _tables(width: int) -> Tables:
    def words(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    return Tables(
        seen=words(3, width),
        counts=words(3, width),
        lengths=words(3),
        penalties=words(3, 3).float(),
        bias_tokens=words(3, width),
        biases=words(3, width).float(),
        allowed=words(3, width),
        ends=words(3, width),
        ends_from=words(3),
        positions=words(3),
    )


def _adjust(dtype: torch.dtype, width: int) -> None:
    adjust(torch.empty(3, 128_256, dtype=dtype, device="meta"), _tables(width))


LAUNCHES = {
    "bf16": partial(_adjust, torch.bfloat16, 5),
    "nothing": partial(_adjust, torch.float32, 0),
    "note": lambda: note(torch.empty(3, dtype=torch.int64, device="meta"), _tables(5)),
}
