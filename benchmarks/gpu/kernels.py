"""The kernels between the products, by the bytes that they must move, against copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.timing import seconds
from engine.gpu.kernels.activation import gated
from engine.gpu.kernels.blocks import gather, scatter
from engine.gpu.kernels.norm import add_rms_norm, rms_norm
from engine.gpu.kernels.rope import rotate_and_store
from engine.model.pool import KvGeometry, KvPool


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel at one size: the call, and the bytes that it reads and writes at least."""

    name: str
    tokens: int
    call: Callable[[], object]
    bytes: int


@dataclass(frozen=True, slots=True)
class Timed:
    """One kernel's median."""

    name: str
    tokens: int
    seconds: float
    share: float  # of copy bandwidth


def measure(device: torch.device, ceilings: Ceilings, tokens: tuple[int, ...]) -> list[Timed]:
    """Every kernel at these numbers of tokens, with the widths of Llama-3-8B in bfloat16."""
    found = []
    for count in tokens:
        for case in (*_rows(device, count), *_blocks(device, count)):
            took = seconds(case.call, device)
            found.append(Timed(case.name, count, took, case.bytes / took / ceilings.read))
    return found


def _rows(device: torch.device, tokens: int) -> Iterator[Case]:
    hidden, intermediate, heads, kv_heads, dim = 4096, 14336, 32, 8, 128
    x, residual = _random(device, tokens, hidden), _random(device, tokens, hidden)
    weight = _random(device, hidden)
    size = x.numel() * 2
    yield Case("rms_norm", tokens, lambda: rms_norm(x, weight, 1e-5), 2 * size)
    yield Case("add_rms_norm", tokens, lambda: add_rms_norm(x, residual, weight, 1e-5), 4 * size)
    gate_up = _random(device, tokens, 2 * intermediate)
    yield Case("gated", tokens, lambda: gated(gate_up, "silu"), gate_up.numel() * 3)
    pool = _pool(device, -(-tokens // 16), kv_heads, dim)
    qkv = _random(device, tokens, (heads + 2 * kv_heads) * dim)
    rotations = torch.rand(tokens, dim, device=device)
    places = torch.arange(tokens, device=device)

    def rotate() -> Tensor:
        return rotate_and_store(
            qkv,
            rotations,
            places,
            places,
            pool.keys(0),
            pool.values(0),
            None,
            heads=heads,
            kv_heads=kv_heads,
            q_norm=None,
            k_norm=None,
            eps=1e-5,
        )

    yield Case("rotate_and_store", tokens, rotate, 2 * qkv.numel() * 2 + rotations.numel() * 4)


def _blocks(device: torch.device, tokens: int) -> Iterator[Case]:
    """Blocks of all layers of Llama-3-8B would be two MiB each; these have four layers."""
    count = max(1, tokens // 16)
    pool = _pool(device, 2 * count, 8, 128, layers=4)
    chosen = torch.randperm(2 * count, device=device)[:count]
    rows = torch.empty(count, pool.block_bytes, dtype=torch.uint8, device=device)
    size = 2 * rows.numel()
    yield Case("gather blocks", tokens, lambda: gather(pool.storage, chosen, rows), size)
    yield Case("scatter blocks", tokens, lambda: scatter(chosen, rows, pool.storage), size)


def _pool(device: torch.device, blocks: int, kv_heads: int, dim: int, *, layers: int = 1) -> KvPool:
    geometry = KvGeometry.of("random", layers, kv_heads, dim, torch.bfloat16, 16)
    return KvPool(geometry, blocks, device=device)


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).bfloat16()
