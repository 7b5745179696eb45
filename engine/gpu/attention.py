"""Paged attention by Triton kernels: for the fused pass, and as the AttentionBackend of GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.attention.contract import Batch, KvCache
from engine.gpu.kernels.decode_attention import decode_attention
from engine.gpu.kernels.kv_store import store_kv
from engine.gpu.kernels.launch import require
from engine.gpu.kernels.prefill_attention import prefill_attention
from engine.gpu.ragged import Ragged


def attend(
    q: Tensor,
    cache: KvCache,
    layer: int,
    ragged: Ragged,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of a pass whose keys and values are in the pool already.

    q [T, heads, head_dim]; `window` w lets position p see [p - w + 1, p]. Returns [T, heads,
    head_dim], contiguous. Nothing waits for the device; where every sequence has a single token,
    a CUDA graph can record it.
    """
    keys, values, scales = cache.keys(layer), cache.values(layer), cache.scales(layer)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    longest = ragged.longest_single(cache.block_size)
    if longest:
        decode_attention(
            q,
            keys,
            values,
            scales,
            ragged.block_tables,
            ragged.contexts,
            scale=scale,
            max_context=longest,
            window=window,
            softcap=softcap,
            singles=ragged.singles,
            out=out,
        )
    if ragged.chunks is not None:
        prefill_attention(
            q,
            keys,
            values,
            scales,
            ragged.block_tables,
            ragged.chunks,
            scale=scale,
            window=window,
            softcap=softcap,
            out=out,
        )
    return out


class TritonAttention:
    """An AttentionBackend. Serves one pass at a time."""

    def __init__(self, device: torch.device | str) -> None:
        """Raises ConfigError for a device that Triton has no kernels for."""
        require(torch.device(device))
        self._batch: Batch | None = None
        self._ragged: Ragged

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        cache: KvCache,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """See the contract."""
        if batch is not self._batch:
            self._batch, self._ragged = batch, Ragged.of(batch)
        pool = cache.keys(layer), cache.values(layer), cache.scales(layer)
        store_kv(_together(k), _together(v), *pool, batch.slots)
        if q.stride(2) != 1:
            q = q.contiguous()
        return attend(q, cache, layer, self._ragged, scale=scale, window=window, softcap=softcap)


def _together(new: Tensor) -> Tensor:
    """Keys or values with the heads of a token beside each other, as a fused projection has them;
    transformers' have the tokens of a head so."""
    return new if new.stride()[1:] == (new.shape[2], 1) else new.contiguous()
