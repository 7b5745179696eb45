"""Launches of sample.py, at the vocabularies of Llama-3 and of a 135M Llama."""

from __future__ import annotations

from functools import partial

import torch

from engine.gpu.kernels.sample import Draws, Space, best_tokens, sample


def _column(dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(3, dtype=dtype, device="meta")


def _sample(vocabulary: int, dtype: torch.dtype, drawn: bool) -> None:
    logits = torch.empty(3, vocabulary, dtype=dtype, device="meta")
    space = Space(3, vocabulary, "meta")
    if not drawn:
        best_tokens(logits, space)
        return
    number, word = torch.float32, torch.int32
    draws = Draws(
        *map(_column, (number, word, number, number, torch.int64, word, word)),
    )
    sample(logits, draws, space)


LAUNCHES = {
    "drawn-128256": partial(_sample, 128256, torch.bfloat16, True),
    "best-49152": partial(_sample, 49152, torch.float32, False),
}
