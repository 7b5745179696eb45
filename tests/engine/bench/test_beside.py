"""The benchmark measures what it says, on any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from engine.bench.beside import measure


def test_every_batch_size_gives_a_row(tiny: Callable[..., Any]) -> None:
    said: list[str] = []
    rows = measure(
        tiny("llama").path,
        "tiny",
        "bfloat16",
        batches=(1, 3),
        context=20,
        steps=3,
        threads=1,
        progress=said.append,
    )
    assert [(row.model, row.dtype, row.batch, row.context) for row in rows] == [
        ("tiny", "bfloat16", 1, 20),
        ("tiny", "bfloat16", 3, 20),
    ]
    for row in rows:
        assert min(row.prefill, row.step, row.reference_step) > 0
        assert row.tokens_per_second == row.batch / row.step
        assert row.ratio == row.reference_step / row.step
    assert len(said) == 3
    assert torch.get_num_threads() == 1
