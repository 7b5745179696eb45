"""Launches of attention, at the shapes of Llama-3-8B, Qwen3-0.6B and odd ones."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.gpu.kernels.decode_attention import Singles, decode_attention
from engine.gpu.kernels.kv_store import store_kv
from engine.gpu.kernels.prefill_attention import prefill_attention
from engine.gpu.ragged import Chunks
from engine.model.pool import KvGeometry, KvPool

_HALF = torch.bfloat16
_INT32 = torch.int32


def _pool(dtype: torch.dtype, kv_heads: int, dim: int, block_size: int) -> KvPool:
    return KvPool(KvGeometry.of("", 2, kv_heads, dim, dtype, block_size), 1000, device="meta")


def _integers(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=_INT32, device="meta")


def _decode(
    heads: int,
    kv_heads: int,
    dim: int,
    kv: torch.dtype = _HALF,
    *,
    dtype: torch.dtype = _HALF,
    context: int = 8192,
    block_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    mixed: bool = False,
) -> None:
    pool = _pool(kv, kv_heads, dim, block_size)
    decode_attention(
        torch.empty(7, heads, dim, dtype=dtype, device="meta"),
        pool.keys(1),
        pool.values(1),
        pool.scales(1),
        torch.empty(7, 64, dtype=torch.int64, device="meta"),
        _integers(7),
        scale=dim**-0.5,
        max_context=context,
        window=window,
        softcap=softcap,
        singles=Singles(_integers(5), _integers(7)) if mixed else None,
    )


def _prefill(
    heads: int,
    kv_heads: int,
    dim: int,
    kv: torch.dtype = _HALF,
    *,
    dtype: torch.dtype = _HALF,
    longest: int = 512,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    pool = _pool(kv, kv_heads, dim, 16)
    spans = np.zeros(7, dtype=np.int32), np.full(7, longest, dtype=np.int32)
    chunks = Chunks(_integers(7), _integers(7), Singles(_integers(7), _integers(7)), spans)
    q = torch.empty(700, heads, dim, dtype=dtype, device="meta")
    prefill_attention(
        q,
        pool.keys(1),
        pool.values(1),
        pool.scales(1),
        torch.empty(7, 64, dtype=torch.int64, device="meta"),
        chunks,
        scale=dim**-0.5,
        window=window,
        softcap=softcap,
    )


def _store(kv: torch.dtype, *, kv_heads: int = 8, dim: int = 128) -> None:
    pool = _pool(kv, kv_heads, dim, 16)
    projected = torch.empty(7, 48, dim, dtype=_HALF, device="meta")
    store_kv(
        projected[:, 32 : 32 + kv_heads],
        projected[:, 40 : 40 + kv_heads],
        pool.keys(1),
        pool.values(1),
        pool.scales(1),
        torch.empty(7, dtype=torch.int64, device="meta"),
    )


WIDE = {"store": partial(_store, _HALF)}
LAUNCHES = WIDE | {
    "store-int8": partial(_store, torch.int8),
    "store-float8": partial(_store, torch.float8_e4m3fn),
    "store-80": partial(_store, _HALF, kv_heads=3, dim=80),
    "decode-llama": partial(_decode, 32, 8, 128),
    "decode-llama-blocks-of-64": partial(_decode, 32, 8, 128, block_size=64),
    "decode-llama-short": partial(_decode, 32, 8, 128, context=256),
    "decode-llama-int8": partial(_decode, 32, 8, 128, torch.int8),
    "decode-llama-float8": partial(_decode, 32, 8, 128, torch.float8_e4m3fn),
    "decode-llama-float16-mixed": partial(
        _decode, 32, 8, 128, torch.float16, dtype=torch.float16, mixed=True
    ),
    "decode-qwen": partial(_decode, 16, 8, 128),
    "decode-window": partial(_decode, 32, 8, 128, window=4096),
    "decode-float32": partial(_decode, 9, 3, 64, torch.float32, dtype=torch.float32),
    "decode-80": partial(_decode, 32, 32, 80),
    "decode-256-softcap": partial(_decode, 8, 4, 256, softcap=50.0),
    "decode-71-heads": partial(_decode, 71, 1, 64),
    "prefill-llama": partial(_prefill, 32, 8, 128),
    "prefill-llama-short": partial(_prefill, 32, 8, 128, longest=4),
    "prefill-llama-int8": partial(_prefill, 32, 8, 128, torch.int8),
    "prefill-llama-float8": partial(_prefill, 32, 8, 128, torch.float8_e4m3fn),
    "prefill-float16": partial(_prefill, 14, 2, 64, torch.float16, dtype=torch.float16),
    "prefill-window": partial(_prefill, 32, 8, 128, window=4096),
    "prefill-float32": partial(_prefill, 9, 3, 64, torch.float32, dtype=torch.float32),
    "prefill-80": partial(_prefill, 32, 32, 80),
    "prefill-256-softcap": partial(_prefill, 8, 4, 256, softcap=50.0),
}
