"""The plain-torch backend against attention written out, position by position."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baton.errors import ConfigError
from baton.types import Request, Sampling, Stopping
from engine.attention.contract import Batch
from engine.attention.reference import TorchAttention
from engine.attention.select import attention_names, select_attention
from engine.model.batch import build_batch
from engine.model.pool import KvGeometry, KvPool
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence

DIM = 16


def expected(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """q [L, heads, dim] at positions from `start`; keys, values [C, kv_heads, dim]."""
    groups = q.shape[1] // keys.shape[1]
    keys = keys.double().repeat_interleave(groups, 1)
    values = values.double().repeat_interleave(groups, 1)
    rows = []
    for offset, row in enumerate(q.double()):  # [heads, dim]
        position = start + offset
        first = 0 if window is None else max(0, position - window + 1)
        seen = slice(first, position + 1)
        scores = torch.einsum("hd,chd->hc", row, keys[seen]) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        rows.append(torch.einsum("hc,chd->hd", scores.softmax(-1), values[seen]))
    return torch.stack(rows)


def in_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each head of each token as int8, and its scale."""
    x = x.float()
    scales = x.abs().amax(-1) / 127
    return (x / scales[..., None]).round().to(torch.int8), scales


class Scene:
    """Sequences with random history in a shuffled pool, about to run one pass."""

    def __init__(
        self,
        chunks: list[tuple[int, int]],
        *,
        heads: int,
        kv_heads: int,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`chunks`: (start, length) of each."""
        torch.manual_seed(3)
        needed = [-(-(start + length) // block_size) for start, length in chunks]
        geometry = KvGeometry.of("", 2, kv_heads, DIM, kv_dtype or dtype, block_size)
        self.pool = KvPool(geometry, sum(needed) + 3)
        free = list(range(self.pool.blocks))
        random.Random(5).shuffle(free)
        self.chunks, self.history = [], []
        for (start, length), blocks in zip(chunks, needed, strict=True):
            request = Request("r", (0,) * (start + length), Sampling(), Stopping(1))
            sequence = Sequence.start(request, 0, now=0.0)
            sequence.blocks = [free.pop() for _ in range(blocks)]
            self.chunks.append(Chunk(sequence, start, length, sample=True))
            kv = torch.randn(2, start, kv_heads, DIM, dtype=dtype)
            self._store(sequence, kv)
            self.history.append(kv)
        tokens = sum(length for _, length in chunks)
        self.q = torch.randn(tokens, heads, DIM, dtype=dtype)
        self.k = torch.randn(tokens, kv_heads, DIM, dtype=dtype)
        self.v = torch.randn(tokens, kv_heads, DIM, dtype=dtype)
        self.batch: Batch = build_batch(StepPlan(tuple(self.chunks)), block_size)[0]

    def _store(self, sequence: Sequence, kv: Tensor) -> None:
        size = self.pool.block_size
        for position in range(kv.shape[1]):
            slot = sequence.blocks[position // size], position % size
            planes = (self.pool.keys(1), self.pool.values(1))
            scales = self.pool.scales(1)
            for which, plane in enumerate(planes):
                if scales is None:
                    plane[slot] = kv[which, position]
                else:
                    plane[slot], scales[which][slot] = in_int8(kv[which, position])

    def _kept(self, x: Tensor) -> Tensor:
        """What the pool makes of keys or values."""
        if self.pool.scales(1) is None:
            return x
        numbers, scales = in_int8(x)
        return numbers * scales[..., None]

    def check(self, tolerance: float, **options: Any) -> None:
        """The backend's output for layer 1 is what attention is by definition."""
        scale = 1 / math.sqrt(DIM)
        found = TorchAttention().attend(
            1, self.q, self.k, self.v, self.batch, self.pool, scale=scale, **options
        )
        assert found.dtype is self.q.dtype
        row = 0
        for chunk, kv in zip(self.chunks, self.history, strict=True):
            rows = slice(row, row + chunk.length)
            keys = self._kept(torch.cat((kv[0], self.k[rows])))
            values = self._kept(torch.cat((kv[1], self.v[rows])))
            right = expected(
                self.q[rows],
                keys,
                values,
                chunk.start,
                scale,
                options.get("window"),
                options.get("softcap"),
            )
            torch.testing.assert_close(found[rows].double(), right, atol=tolerance, rtol=0)
            row += chunk.length


MIXED = [(40, 1), (0, 1), (300, 1), (17, 1), (0, 30), (33, 5), (700, 1), (0, 300), (130, 140)]


@pytest.mark.parametrize("window", [None, 1, 13, 150])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_a_mixed_batch_is_attended_to_by_definition(
    heads: int, kv_heads: int, window: int | None
) -> None:
    Scene(MIXED, heads=heads, kv_heads=kv_heads).check(1e-5, window=window)


@pytest.mark.parametrize("window", [None, 13])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (12, 12)])
def test_bfloat16_is_right_to_its_precision(heads: int, kv_heads: int, window: int | None) -> None:
    scene = Scene(MIXED, heads=heads, kv_heads=kv_heads, dtype=torch.bfloat16)
    scene.check(0.05, window=window)


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_int8_is_what_its_rounded_keys_and_values_make(
    heads: int, kv_heads: int, block_size: int
) -> None:
    for window in (None, 13):
        scene = Scene(
            MIXED, heads=heads, kv_heads=kv_heads, block_size=block_size, kv_dtype=torch.int8
        )
        scene.check(1e-5, window=window)


def test_int8_beside_bfloat16_is_right_to_the_precision_of_bfloat16() -> None:
    for kv_heads in (2, 12):
        scene = Scene(MIXED, heads=12, kv_heads=kv_heads, dtype=torch.bfloat16, kv_dtype=torch.int8)
        scene.check(0.05)


def test_float16_is_right_to_its_precision() -> None:
    Scene(MIXED, heads=6, kv_heads=2, dtype=torch.float16).check(0.01)


def test_scores_are_capped_where_the_model_asks_for_it() -> None:
    Scene(MIXED, heads=6, kv_heads=2).check(1e-5, softcap=0.5, window=50)


@settings(max_examples=40, deadline=None)
@given(
    chunks=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 3, 16, 64]),
    window=st.none() | st.integers(1, 80),
)
def test_any_ragged_batch_is_attended_to_by_definition(
    chunks: list[tuple[int, int]], block_size: int, window: int | None
) -> None:
    Scene(chunks, heads=4, kv_heads=2, block_size=block_size).check(1e-5, window=window)


def test_layers_with_different_windows_share_a_pass() -> None:
    scene = Scene([(40, 1), (0, 30)], heads=4, kv_heads=2)
    backend = TorchAttention()

    def run(layer: int, window: int | None) -> Tensor:
        return backend.attend(
            layer, scene.q, scene.k, scene.v, scene.batch, scene.pool, scale=0.25, window=window
        )

    full, narrow, full_again = run(1, None), run(1, 3), run(1, None)
    assert torch.equal(full, full_again)
    assert not torch.equal(full, narrow)


def test_only_the_slots_of_the_pass_are_written() -> None:
    scene = Scene([(5, 1), (0, 3)], heads=4, kv_heads=2, block_size=4)
    before = scene.pool.storage.clone()
    TorchAttention().attend(1, scene.q, scene.k, scene.v, scene.batch, scene.pool, scale=1.0)
    changed = (scene.pool.storage != before).any(-1).any(-1)  # [blocks, layers, 2, block_size]
    assert not changed[:, 0].any()
    written = changed[:, 1].all(1).flatten().nonzero().flatten().tolist()
    assert written == sorted(scene.batch.slots.tolist())


def test_only_the_slots_of_the_pass_are_written_in_int8() -> None:
    scene = Scene([(5, 1), (0, 3)], heads=4, kv_heads=2, block_size=4, kv_dtype=torch.int8)
    before = scene.pool.storage.clone()
    TorchAttention().attend(1, scene.q, scene.k, scene.v, scene.batch, scene.pool, scale=1.0)
    changed = scene.pool.storage != before  # [blocks, layers, 2, plane_bytes]
    numbers, scales = changed.split((4 * 2 * DIM, 4 * 2 * 4), -1)
    assert not changed[:, 0].any()
    for part in (numbers, scales):
        written = part[:, 1].unflatten(-1, (4, -1)).any(-1).all(1).flatten().nonzero().flatten()
        assert written.tolist() == sorted(scene.batch.slots.tolist())


def test_backends_are_chosen_by_name() -> None:
    assert isinstance(select_attention("auto", "cpu"), TorchAttention)
    assert isinstance(select_attention("torch", "cpu"), TorchAttention)
    assert "torch" in attention_names()
    with pytest.raises(ConfigError, match="--attention-backend magic"):
        select_attention("magic", "cpu")
