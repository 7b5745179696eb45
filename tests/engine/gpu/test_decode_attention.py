"""Attention of single tokens over paged contexts, beside its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.gpu.kernels import decode_attention as kernel
from engine.gpu.kernels.decode_attention import Singles, decode_attention, decode_workspace
from tests.engine.gpu.attention_scene import LAYER, Scene

SCALE = 0.3
SINGLES = [(0, 1), (40, 1), (15, 1), (70, 1)]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the scene, of the call
    "float32": ({}, {}),
    "odd-heads": ({"heads": 5, "kv_heads": 5, "dim": 80, "block_size": 3}, {}),
    "narrow-heads": ({"heads": 3, "kv_heads": 1, "dim": 8, "block_size": 32}, {}),
    "many-heads": ({"heads": 20, "kv_heads": 1, "dim": 32}, {}),
    "bfloat16": ({"dtype": torch.bfloat16, "dim": 32}, {}),
    "float16": ({"dtype": torch.float16}, {"softcap": 0.7}),
    "window-of-1": ({}, {"window": 1}),
    "window": ({"block_size": 4}, {"window": 21}),
    "int8": ({"kv_dtype": torch.int8}, {"window": 50}),
    "int8-bfloat16": ({"kv_dtype": torch.int8, "dtype": torch.bfloat16}, {}),
    "float8": ({"kv_dtype": torch.float8_e4m3fn, "dim": 64}, {}),
    "float8-float16": ({"kv_dtype": torch.float8_e4m3fn, "dtype": torch.float16}, {}),
    "softcap": ({}, {"softcap": 0.5, "window": 30}),
}


@pytest.fixture
def cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 16 tokens, at most 4 of them: contexts above 64 have longer ones."""

    def tuned(*_: object) -> dict[str, int]:
        return {"TILE": 16, "SHORTEST": 16, "PARTS": 4, "num_warps": 4, "num_stages": 2}

    monkeypatch.setattr(kernel, "tuned", tuned)


def contexts(scene: Scene) -> Tensor:
    """[S] int32."""
    ends = [chunk.start + chunk.length for chunk in scene.chunks]
    return torch.tensor(ends, dtype=torch.int32, device=scene.q.device)


def decode(scene: Scene, **options: Any) -> Tensor:
    """All rows of a scene of single tokens."""
    scene.store()
    options = {"max_context": 100, "scale": SCALE} | options
    return decode_attention(scene.q, *scene.pooled(), contexts(scene), **options)


@pytest.mark.parametrize("name", CASES)
def test_single_tokens_are_attended_to_by_definition(name: str, device: torch.device) -> None:
    scene = Scene(device, SINGLES, **CASES[name][0])
    scene.check(decode(scene, **CASES[name][1]), SCALE, **CASES[name][1])


@pytest.mark.parametrize("name", ["float32", "odd-heads", "window", "int8", "softcap"])
def test_parts_of_a_context_add_up_to_the_whole(
    name: str, device: torch.device, cut_short: None
) -> None:
    scene = Scene(device, SINGLES, **CASES[name][0])
    scene.check(decode(scene, **CASES[name][1]), SCALE, **CASES[name][1])


@pytest.mark.parametrize("window", [None, 40])
def test_a_sequence_gets_the_same_bits_in_every_company_and_under_every_bound(
    window: int | None, device: torch.device, cut_short: None
) -> None:
    scene = Scene(device, SINGLES, dtype=torch.bfloat16)
    together = decode(scene, window=window)
    keys, values, scales, tables = scene.pooled()
    for row, context in enumerate(contexts(scene)):
        alone = decode_attention(
            scene.q[row : row + 1],
            keys,
            values,
            scales,
            tables[row : row + 1].int(),
            context[None],
            scale=SCALE,
            max_context=int(context),
            window=window,
        )
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("max_context", [16, 100], ids=["whole", "in-parts"])
def test_rows_of_padding_become_zero_and_read_nothing(
    max_context: int, device: torch.device, cut_short: None
) -> None:
    scene = Scene(device, [(9, 1), (5, 1), (7, 1)])
    scene.store()
    ends = contexts(scene)
    ends[1] = 0
    scene.batch.block_tables[1] = 2**40
    out = torch.full_like(scene.q, torch.nan)
    found = decode_attention(
        scene.q, *scene.pooled(), ends, scale=SCALE, max_context=max_context, out=out
    )
    assert found is out
    assert not out[1].any()
    del scene.chunks[1]
    scene.q = scene.q[[0, 2]]
    scene.check(out[[0, 2]], SCALE)


def test_only_the_rows_of_single_tokens_are_written(device: torch.device) -> None:
    scene = Scene(device, [(0, 3), (20, 1), (4, 2), (33, 1)])
    scene.store()
    singles = Singles(*torch.tensor([[1, 3, 0, 0], [0, 3, 4, 6]], device=device).int())
    out = torch.full_like(scene.q, 7.0)
    decode_attention(
        scene.q,
        *scene.pooled(),
        contexts(scene),
        scale=SCALE,
        max_context=34,
        singles=Singles(singles.members[:2], singles.rows),
        out=out,
    )
    assert (out[[0, 1, 2, 4, 5]] == 7.0).all()
    scene.chunks = [scene.chunks[1], scene.chunks[3]]
    scene.q = scene.q[[3, 6]]
    scene.check(out[[3, 6]], SCALE)


def test_what_was_in_the_workspace_does_not_matter(device: torch.device, cut_short: None) -> None:
    scene = Scene(device, SINGLES)
    workspace = decode_workspace(len(SINGLES), 6, scene.pool.keys(LAYER), 100)
    assert workspace.numel() == 4 * 4 * 6 * (16 + 2)
    scene.check(decode(scene, workspace=workspace.fill_(torch.nan)), SCALE)


def test_queries_may_be_a_part_of_a_projection(device: torch.device) -> None:
    scene = Scene(device, SINGLES)
    projected = torch.cat((scene.k, scene.q, scene.v), dim=1)
    scene.q = projected[:, 2:8]
    scene.check(decode(scene), SCALE)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_long_contexts_of_a_real_shape(kv_dtype: torch.dtype, device: torch.device) -> None:
    chunks = [(8191, 1), (300, 1), (0, 1), (5000, 1)]
    scene = Scene(
        device,
        chunks,
        heads=32,
        kv_heads=8,
        dim=128,
        dtype=torch.bfloat16,
        kv_dtype=kv_dtype,
    )
    scene.check(decode(scene, max_context=8192), SCALE)
