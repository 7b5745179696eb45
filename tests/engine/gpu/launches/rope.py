"""Launches of rope.py, for the heads of Llama-3-8B, Qwen3-0.6B and odd ones."""

from __future__ import annotations

from functools import partial

import torch

from engine.gpu.kernels.rope import rotate_and_store


def _rotate(
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    kv: torch.dtype | None = None,
    norm: bool = False,
) -> None:
    new = partial(torch.empty, device="meta")
    planes = new(2, 4, 16, kv_heads, head_dim, dtype=kv or dtype)
    scales = new(2, 4, 16, kv_heads)
    weight = new(head_dim, dtype=dtype) if norm else None
    rotate_and_store(
        new(5, (heads + 2 * kv_heads) * head_dim, dtype=dtype),
        new(4096, head_dim),
        new(5, dtype=torch.int64),
        new(5, dtype=torch.int64),
        planes[0],
        planes[1],
        (scales[0], scales[1]) if kv else None,
        heads=heads,
        kv_heads=kv_heads,
        q_norm=weight,
        k_norm=weight,
        eps=1e-6,
    )


WIDE = {
    "llama-bf16": partial(_rotate, 32, 8, 128, torch.bfloat16),
    "qwen3-fp16": partial(_rotate, 16, 8, 128, torch.float16, norm=True),
    "llama-int8": partial(_rotate, 32, 8, 128, torch.bfloat16, torch.int8),
}
LAUNCHES = WIDE | {
    "odd-fp32": partial(_rotate, 9, 3, 64, torch.float32),
    "eighty-bf16": partial(_rotate, 4, 4, 80, torch.bfloat16, norm=True),
    "eighty-int8": partial(_rotate, 4, 2, 80, torch.bfloat16, torch.int8, norm=True),
    "qwen3-fp8": partial(_rotate, 16, 8, 128, torch.bfloat16, torch.float8_e4m3fn, norm=True),
}
