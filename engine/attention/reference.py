"""Attention in plain torch: runs on every device, and every faster backend is judged against it.

Sequences with one token in the pass attend together, in groups of similar context, over keys and
values gathered from their blocks. Longer chunks attend one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.attention.contract import Batch, KvCache

_WIDTH = 256  # tokens of context: up to here sequences of different length share a group


@dataclass(frozen=True, slots=True)
class _Singles:
    """S sequences that have one token each in the pass, their contexts padded to B blocks."""

    rows: Tensor | slice  # [S] rows of the flat batch
    blocks: Tensor  # [S * B] int64
    mask: Tensor  # [S, 1, 1, B * block_size], added to the scores


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A chunk of several tokens, L of them, that sees the last C tokens of its context."""

    rows: slice  # of the flat batch
    blocks: Tensor  # [B] int64: the blocks that hold what it sees
    offset: int  # where in the first block that begins
    mask: Tensor  # [L, C], added to the scores


@dataclass(frozen=True, slots=True)
class _Pass:
    """How one batch is attended to; the same for all layers with one window."""

    singles: tuple[_Singles, ...]
    prompts: tuple[_Prompt, ...]


class TorchAttention:
    """An AttentionBackend. Serves one pass at a time."""

    def __init__(self) -> None:
        self._batch: Batch | None = None
        self._slots: tuple[Tensor, Tensor]  # block and offset of each token
        self._passes: dict[int | None, _Pass] = {}

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
        work = self._prepared(batch, cache.block_size, window, q.dtype)
        keys, values = cache.keys(layer), cache.values(layer)
        keys[self._slots] = k
        values[self._slots] = v
        mixed = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in work.singles:
            mixed[group.rows] = _attend_singles(q[group.rows], keys, values, group, scale, softcap)
        for prompt in work.prompts:
            mixed[prompt.rows] = _attend_prompt(
                q[prompt.rows], keys, values, prompt, scale, softcap
            )
        return mixed

    def _prepared(
        self, batch: Batch, block_size: int, window: int | None, dtype: torch.dtype
    ) -> _Pass:
        """What the batch needs, made in its first layer and kept for the others."""
        if batch is not self._batch:
            slots = batch.slots
            self._slots = (slots // block_size, slots % block_size)
            self._batch, self._passes = batch, {}
        work = self._passes.get(window)
        if work is None:
            work = self._passes[window] = _prepare(batch, block_size, window, dtype)
        return work


def _prepare(batch: Batch, block_size: int, window: int | None, dtype: torch.dtype) -> _Pass:
    groups: dict[int, list[int]] = {}  # bucket of context length: sequences
    firsts: list[int] = []  # first row of each sequence
    prompts: list[_Prompt] = []
    row = 0
    for index, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        firsts.append(row)
        if length == 1:
            seen = min(start + 1, window or start + 1)
            groups.setdefault((-(-seen // _WIDTH) - 1).bit_length(), []).append(index)
        else:
            prompts.append(
                _prompt(batch, index, slice(row, row + length), block_size, window, dtype)
            )
        row += length
    singles = [
        _singles(batch, members, [firsts[i] for i in members], block_size, window, dtype)
        for members in groups.values()
    ]
    return _Pass(tuple(singles), tuple(prompts))


def _singles(
    batch: Batch,
    members: list[int],
    rows: list[int],
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
) -> _Singles:
    device = batch.block_tables.device
    ends = torch.tensor([batch.starts[i] + 1 for i in members], device=device)[:, None]  # [S, 1]
    seen_from = torch.zeros_like(ends) if window is None else (ends - window).clamp_(min=0)
    first_block = seen_from // block_size
    width = int(((ends - 1) // block_size - first_block).max()) + 1
    columns = first_block + torch.arange(width, device=device)  # [S, B]
    last = batch.block_tables.shape[1] - 1
    blocks = batch.block_tables[
        torch.tensor(members, device=device)[:, None], columns.clamp(max=last)
    ]
    positions = first_block * block_size + torch.arange(width * block_size, device=device)
    hidden = (positions < seen_from) | (positions >= ends)  # [S, B * block_size]
    contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
    return _Singles(
        rows=slice(rows[0], rows[0] + len(rows))
        if contiguous
        else torch.tensor(rows, device=device),
        blocks=blocks.reshape(-1),
        mask=_additive(hidden, dtype)[:, None, None],
    )


def _prompt(
    batch: Batch, index: int, rows: slice, block_size: int, window: int | None, dtype: torch.dtype
) -> _Prompt:
    device = batch.block_tables.device
    start, end = batch.starts[index], batch.starts[index] + batch.lengths[index]
    seen_from = 0 if window is None else max(0, start + 1 - window)
    q_positions = torch.arange(start, end, device=device)[:, None]
    k_positions = torch.arange(seen_from, end, device=device)
    hidden = k_positions > q_positions
    if window is not None:
        hidden |= k_positions <= q_positions - window
    first, last = seen_from // block_size, (end - 1) // block_size
    return _Prompt(
        rows=rows,
        blocks=batch.block_tables[index, first : last + 1],
        offset=seen_from - first * block_size,
        mask=_additive(hidden, dtype),
    )


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf where hidden."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _attend_singles(
    q: Tensor, keys: Tensor, values: Tensor, group: _Singles, scale: float, softcap: float | None
) -> Tensor:
    """q [S, heads, head_dim] -> the same shape."""
    count, heads, dim = q.shape
    kv_heads = keys.shape[2]
    k = keys.index_select(0, group.blocks).view(count, -1, kv_heads, dim).transpose(1, 2)
    v = values.index_select(0, group.blocks).view(count, -1, kv_heads, dim).transpose(1, 2)
    # The heads that share a key head take the place of query positions: with a query length of 1
    # and heads expanded instead, bfloat16 attention on a CPU is ten times slower.
    grouped = q.reshape(count, kv_heads, heads // kv_heads, dim)
    mixed = _attention(grouped, k, v, group.mask, scale, softcap)
    return mixed.reshape(count, heads, dim)


def _attend_prompt(
    q: Tensor, keys: Tensor, values: Tensor, prompt: _Prompt, scale: float, softcap: float | None
) -> Tensor:
    """q [L, heads, head_dim] -> the same shape."""
    length, heads, dim = q.shape
    kv_heads = keys.shape[2]
    seen = slice(prompt.offset, prompt.offset + prompt.mask.shape[1])
    k = keys.index_select(0, prompt.blocks).view(-1, kv_heads, dim)[seen].transpose(0, 1)
    v = values.index_select(0, prompt.blocks).view(-1, kv_heads, dim)[seen].transpose(0, 1)
    groups = heads // kv_heads
    grouped = q.reshape(length, kv_heads, groups, dim).permute(1, 2, 0, 3)
    grouped = grouped.reshape(1, kv_heads, groups * length, dim)
    mask = prompt.mask.repeat(groups, 1)
    mixed = _attention(grouped, k[None], v[None], mask, scale, softcap)
    mixed = mixed.view(kv_heads, groups, length, dim)
    return mixed.permute(2, 0, 1, 3).reshape(length, heads, dim)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """softmax(softcap(q k^T scale) + mask) v, over the last two dimensions."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    scores = torch.tanh(scores / softcap) * softcap + mask
    return scores.softmax(-1).to(v.dtype) @ v
