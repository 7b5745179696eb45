"""Sequences and logits to sample from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from baton.types import Request, Sampling, Stopping
from scheduling.sequence import Sequence

VOCAB = 600  # more than two blocks of the draw, and not a multiple of one
PROMPT = (5, 17, 17, 3)
OUTPUT = (17, 250, 250, 599)


def a_sequence(
    sampling: Sampling | None = None,
    *,
    output: tuple[int, ...] = OUTPUT,
    index: int = 0,
    logprobs: int | None = None,
    **stopping: Any,
) -> Sequence:
    request = Request(
        id="r",
        prompt_ids=PROMPT,
        sampling=sampling or Sampling(),
        stopping=Stopping(**{"max_tokens": 100, **stopping}),
        logprobs=logprobs,
    )
    return Sequence(request, index, [*PROMPT, *output], arrived_at=0.0)


def some_logits(rows: int, seed: int = 0, vocab: int = VOCAB, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
