"""Launches of adjust.py, at Llama-3's vocabulary."""

from __future__ import annotations

from functools import partial

import torch

from engine.gpu.kernels.adjust import FIELDS, adjust, forbid

_VOCABULARY = 128_256


def _new(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _adjust(dtype: torch.dtype, ahead: bool) -> None:
    adjust(
        _new(dtype, 3, _VOCABULARY),
        _new(torch.int32, 3, FIELDS),
        _new(torch.int32, 2, _VOCABULARY),
        _new(torch.float32, 2, _VOCABULARY),
        _new(torch.int64, 3) if ahead else None,
    )


def _forbid() -> None:
    scores = _new(torch.float32, 3, _VOCABULARY)
    forbid(scores, _new(torch.int32, 2), _new(torch.int32, 2, 5))


LAUNCHES = {
    "bf16-ahead": partial(_adjust, torch.bfloat16, True),
    "fp32": partial(_adjust, torch.float32, False),
    "forbid": _forbid,
}
WIDE = ("fp32",)
