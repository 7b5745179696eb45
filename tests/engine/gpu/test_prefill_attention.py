"""Attention of prompt chunks over paged contexts, beside its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.gpu.kernels import prefill_attention as kernel
from engine.gpu.kernels.prefill_attention import prefill_attention, tile_queries
from engine.gpu.ragged import Ragged
from tests.engine.gpu.attention_scene import Scene

SCALE = 0.3
CHUNKS = [(0, 5), (33, 2), (0, 40), (50, 19)]
SHORT = [(0, 3), (37, 2)]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the scene, of the call
    "float32": ({}, {}),
    "odd-heads": ({"heads": 3, "kv_heads": 3, "dim": 80, "block_size": 3}, {}),
    "narrow-heads": ({"heads": 2, "kv_heads": 1, "dim": 8, "block_size": 32}, {}),
    "many-heads": ({"heads": 20, "kv_heads": 1, "dim": 32}, {}),
    "bfloat16": ({"dtype": torch.bfloat16, "dim": 32}, {}),
    "float16": ({"dtype": torch.float16}, {"softcap": 0.7}),
    "window-of-1": ({}, {"window": 1}),
    "window": ({"block_size": 4}, {"window": 21}),
    "long-window": ({}, {"window": 64}),
    "int8": ({"kv_dtype": torch.int8}, {"window": 50}),
    "int8-bfloat16": ({"kv_dtype": torch.int8, "dtype": torch.bfloat16}, {}),
    "float8": ({"kv_dtype": torch.float8_e4m3fn}, {}),
    "softcap": ({}, {"softcap": 0.5, "window": 30}),
}


def prefill(scene: Scene, **options: Any) -> Tensor:
    """All rows of a scene of chunks."""
    scene.store()
    chunks = Ragged.of(scene.batch).chunks
    assert chunks is not None
    return prefill_attention(scene.q, *scene.pooled(), chunks, scale=SCALE, **options)


@pytest.mark.parametrize("name", CASES)
def test_chunks_are_attended_to_by_definition(name: str, device: torch.device) -> None:
    scene = Scene(device, CHUNKS, **CASES[name][0])
    scene.check(prefill(scene, **CASES[name][1]), SCALE, **CASES[name][1])


@pytest.mark.parametrize("options", [{}, {"window": 7}], ids=["full", "window"])
def test_chunks_longer_than_a_tile_are_attended_to_by_definition(
    options: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "tile_queries", lambda *_: 5)
    scene = Scene(device, [(21, 45), (0, 33)])
    scene.check(prefill(scene, **options), SCALE, **options)


def test_short_chunks_fill_a_tile_with_the_heads_that_share_a_key_head(
    device: torch.device,
) -> None:
    scene = Scene(device, SHORT, heads=8, kv_heads=2)
    assert tile_queries(scene.q, 2, 3) == 4
    assert tile_queries(scene.q.half(), 2, 1000) == 32
    scene.check(prefill(scene), SCALE)


def test_only_the_rows_of_chunks_are_written(device: torch.device) -> None:
    scene = Scene(device, [(20, 1), (4, 3), (33, 1)])
    out = torch.full_like(scene.q, 7.0)
    assert prefill(scene, out=out) is out
    assert (out[[0, 4]] == 7.0).all()
    scene.chunks, scene.q = scene.chunks[1:2], scene.q[1:4]
    scene.check(out[1:4], SCALE)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_long_chunks_of_a_real_shape(
    kv_dtype: torch.dtype, window: int | None, device: torch.device
) -> None:
    scene = Scene(
        device,
        [(0, 700), (3000, 300), (17, 2)],
        heads=32,
        kv_heads=8,
        dim=128,
        dtype=torch.bfloat16,
        kv_dtype=kv_dtype,
    )
    scene.check(prefill(scene, window=window), SCALE, window=window)
