"""Passes over a pool with random histories, and what attention makes of them by definition."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from baton.types import Request, Sampling, Stopping
from engine.attention.plane import Plane
from engine.model.batch import build_batch
from engine.model.pool import KvGeometry, KvPool
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence
from tests.engine.test_torch_attention import expected

LAYER = 1
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Scene:
    """Sequences in shuffled blocks, about to run one pass on a device."""

    def __init__(
        self,
        device: torch.device,
        chunks: list[tuple[int, int]],
        *,
        heads: int = 6,
        kv_heads: int = 2,
        dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`chunks`: (start, length) of each."""
        torch.manual_seed(3)
        needed = [-(-(start + length) // block_size) for start, length in chunks]
        geometry = KvGeometry.of("", 2, kv_heads, dim, kv_dtype or dtype, block_size)
        self.pool = KvPool(geometry, sum(needed) + 3, device=device)
        self.planes = Plane.pair(self.pool, LAYER)
        free = list(range(self.pool.blocks))
        random.Random(5).shuffle(free)
        self.chunks = []
        for (start, length), blocks in zip(chunks, needed, strict=True):
            request = Request("r", (0,) * (start + length), Sampling(), Stopping(1))
            sequence = Sequence.start(request, 0, now=0.0)
            sequence.blocks = [free.pop() for _ in range(blocks)]
            self.chunks.append(Chunk(sequence, start, length, sample=True))
        self.batch = build_batch(StepPlan(tuple(self.chunks)), block_size, device)[0]
        tokens = len(self.batch.slots)
        self.q = torch.randn(tokens, heads, dim, dtype=dtype, device=device)
        self.k, self.v = torch.randn(2, tokens, kv_heads, dim, dtype=dtype, device=device)
        for chunk in self.chunks:
            history = torch.randn(2, chunk.start, kv_heads, dim, dtype=dtype, device=device)
            positions = torch.arange(chunk.start, device=device)
            table = torch.tensor(chunk.sequence.blocks, device=device)
            slots = (table[positions // block_size], positions % block_size)
            for plane, new in zip(self.planes, history, strict=True):
                plane.write(slots, new)

    def store(self) -> None:
        """Put the keys and values of the pass into the pool, as the reference does."""
        size = self.pool.block_size
        slots = (self.batch.slots // size, self.batch.slots % size)
        for plane, new in zip(self.planes, (self.k, self.v), strict=True):
            plane.write(slots, new)

    def pooled(self) -> tuple[Any, ...]:
        """Keys, values, scales and block tables, as kernels' functions take them."""
        pool = self.pool
        return pool.keys(LAYER), pool.values(LAYER), pool.scales(LAYER), self.batch.block_tables

    def check(
        self, found: Tensor, scale: float, window: int | None = None, softcap: float | None = None
    ) -> None:
        """What was found for all rows is right for what the pool holds."""
        assert found.dtype is self.q.dtype
        row = 0
        for chunk in self.chunks:
            table = torch.tensor(chunk.sequence.blocks, device=found.device)
            keys, values = (
                plane.read(table, torch.float32).flatten(0, 1)[: chunk.start + chunk.length]
                for plane in self.planes
            )
            rows = slice(row, row + chunk.length)
            right = expected(self.q[rows], keys, values, chunk.start, scale, window, softcap)
            # Results are rounded, and so are weights, which are multiplied by the scales of values.
            rtol, atol = torch.finfo(found.dtype).eps, TOLERANCE[found.dtype]
            torch.testing.assert_close(found[rows].double(), right, rtol=rtol, atol=atol)
            row += chunk.length
