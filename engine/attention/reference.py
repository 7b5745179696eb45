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
from engine.attention.plane import Plane

_GROUP_TOKENS = 256  # contexts of up to so many tokens share a group, whatever their length
_MOST_DIAGONAL = 8  # key heads up to which `_block_diagonal` pays
_TILE = 128  # query rows of a prompt that attend at once: what none of them sees is left out


@dataclass(frozen=True, slots=True)
class _Singles:
    """S sequences that have one token each in the pass, their contexts padded to B blocks."""

    rows: Tensor | slice  # [S] rows of the flat batch
    blocks: Tensor  # [S * B] int64
    mask: Tensor  # [S, 1, 1, B * block_size], added to the scores


@dataclass(frozen=True, slots=True)
class _Tile:
    """Some query rows of a prompt chunk and the keys that they see."""

    rows: slice  # of the chunk, L of them
    seen: slice  # of the chunk's gathered context, C of it
    mask: Tensor  # [L, C], added to the scores


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A chunk of several tokens."""

    rows: slice  # of the flat batch
    blocks: Tensor  # [B] int64: the blocks that hold what it sees
    tiles: tuple[_Tile, ...]


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
        keys, values = Plane.pair(cache, layer)
        keys.write(self._slots, k)
        values.write(self._slots, v)
        if len(work.singles) == 1 and not work.prompts:
            return _attend_singles(q, keys, values, work.singles[0], scale, softcap)
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
            groups.setdefault((-(-seen // _GROUP_TOKENS) - 1).bit_length(), []).append(index)
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
    start, length = batch.starts[index], batch.lengths[index]
    first = _seen_from(start, window) // block_size
    last = (start + length - 1) // block_size
    tiles = []
    for begin in range(0, length, _TILE):
        end = min(begin + _TILE, length)
        seen_from = _seen_from(start + begin, window)
        tiles.append(
            _Tile(
                rows=slice(begin, end),
                seen=slice(seen_from - first * block_size, start + end - first * block_size),
                mask=_causal(start + begin, start + end, seen_from, window, batch, dtype),
            )
        )
    return _Prompt(rows, batch.block_tables[index, first : last + 1], tuple(tiles))


def _seen_from(position: int, window: int | None) -> int:
    """The first position that `position` sees."""
    return 0 if window is None else max(0, position + 1 - window)


def _causal(
    start: int, end: int, seen_from: int, window: int | None, batch: Batch, dtype: torch.dtype
) -> Tensor:
    """Mask of queries [start, end) over keys [seen_from, end)."""
    device = batch.block_tables.device
    queries = torch.arange(start, end, device=device)[:, None]
    keys = torch.arange(seen_from, end, device=device)
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return _additive(hidden, dtype)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf where hidden."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _attend_singles(
    q: Tensor, keys: Plane, values: Plane, group: _Singles, scale: float, softcap: float | None
) -> Tensor:
    """q [S, heads, head_dim] -> the same shape."""
    count, heads, dim = q.shape
    kv_heads = keys.kv_heads
    k = keys.read(group.blocks, q.dtype).view(count, -1, kv_heads, dim)  # [S, C, kv_heads, dim]
    v = values.read(group.blocks, q.dtype).view(count, -1, kv_heads, dim)
    # The heads that share a key head take the place of query positions: with a query length of 1
    # and heads expanded instead, bfloat16 attention on a CPU is ten times slower.
    grouped = q.reshape(count, kv_heads, heads // kv_heads, dim)
    if _prefers_products(q, softcap) and kv_heads <= _MOST_DIAGONAL:
        mixed = _block_diagonal(grouped, k, v, group.mask, scale)
    else:
        mixed = _attention(
            grouped, k.transpose(1, 2), v.transpose(1, 2), group.mask, scale, softcap
        )
    return mixed.reshape(count, heads, dim)


def _attend_prompt(
    q: Tensor, keys: Plane, values: Plane, prompt: _Prompt, scale: float, softcap: float | None
) -> Tensor:
    """q [L, heads, head_dim] -> the same shape."""
    length, heads, dim = q.shape
    kv_heads = keys.kv_heads
    groups = heads // kv_heads
    k = keys.read(prompt.blocks, q.dtype).view(-1, kv_heads, dim).transpose(0, 1)
    v = values.read(prompt.blocks, q.dtype).view(-1, kv_heads, dim).transpose(0, 1)
    grouped = q.reshape(length, kv_heads, groups, dim).permute(1, 2, 0, 3)
    mixed = torch.empty((length, kv_heads, groups, dim), dtype=q.dtype, device=q.device)
    for tile in prompt.tiles:
        rows = grouped[:, :, tile.rows].reshape(1, kv_heads, -1, dim)  # [1, kv_heads, G * L, dim]
        tile_k, tile_v = k[None, :, tile.seen], v[None, :, tile.seen]
        mask = tile.mask.repeat(groups, 1)
        output = _attention(rows, tile_k, tile_v, mask, scale, softcap)
        output = output.view(kv_heads, groups, -1, dim)
        mixed[tile.rows] = output.permute(2, 0, 1, 3)
    return mixed.view(length, heads, dim)


def _prefers_products(q: Tensor, softcap: float | None) -> bool:
    """Whether two matrix products beat the fused kernel: on CPUs, in bfloat16 only, 2.5 times."""
    return softcap is None and q.dtype is torch.bfloat16 and q.device.type == "cpu"


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """softmax(softcap(q k^T scale) + mask) v, over the last two dimensions."""
    if softcap is not None:
        scores = (q @ k.transpose(-1, -2)).float() * scale
        scores = torch.tanh(scores / softcap) * softcap + mask
        return scores.softmax(-1).to(v.dtype) @ v
    if _prefers_products(q, softcap):
        scores = ((q * scale) @ k.transpose(-1, -2)).add_(mask)
        return scores.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _block_diagonal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of all heads at once, as two products per sequence over keys as they lie.

    q [S, kv_heads, G, dim]; k, v [S, C, kv_heads, dim]. Each query stands in the columns of its
    own key head, with zeros in those of the others. That costs kv_heads times the arithmetic and
    saves the strided access, which is what is slow: 2.5 times faster with 3 key heads.
    """
    count, kv_heads, groups, dim = q.shape
    wide = q.new_zeros(count, kv_heads, groups, kv_heads, dim)
    wide.diagonal(dim1=1, dim2=3).copy_((q * scale).permute(0, 2, 3, 1))
    rows = wide.view(count, kv_heads * groups, kv_heads * dim)
    scores = torch.bmm(rows, k.flatten(2).transpose(1, 2)).add_(mask[:, 0])
    mixed = torch.bmm(scores.softmax(-1), v.flatten(2))
    mixed = mixed.view(count, kv_heads, groups, kv_heads, dim)
    return mixed.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [S, kv_heads, G, dim]
