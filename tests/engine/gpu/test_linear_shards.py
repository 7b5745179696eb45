"""Products of one rank among several: its part of what one rank multiplies by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.gpu.linear import Dense, Fp8, Int4, Int8, linear
from engine.model.weights import Checkpoint
from engine.parallel.shard import ShardedCheckpoint
from engine.parallel.topology import Topology
from engine.quantization import packing
from engine.quantization.groupwise import quantize

HIDDEN, INNER = 48, 192
KINDS = {"none": Dense, "int8": Int8, "int4": Int4, "fp8": Fp8}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"}


def projections() -> dict[str, Tensor]:
    """One that is divided by columns, with a bias, and one that is divided by rows."""
    random = torch.Generator().manual_seed(7)
    return {
        "l.up_proj.weight": torch.randn(INNER, HIDDEN, generator=random),
        "l.up_proj.bias": torch.randn(INNER, generator=random),
        "l.down_proj.weight": torch.randn(HIDDEN, INNER, generator=random),
    }


def save(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A directory of those."""
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    return path


def dense(
    checkpoint: Checkpoint, name: str, out: int, into: int, quantization: Any
) -> tuple[type, Tensor]:
    """The kind of a product, and its weights, exactly: it multiplies units."""
    made = linear(checkpoint, (name,), (out,), into, False, quantization)
    units = torch.eye(into, device=checkpoint.device)
    return type(made), made(units).T


@pytest.mark.parametrize("quantization", list(KINDS))
@pytest.mark.parametrize("shards", [2, 4, 8])  # 8: shards of 24 cut groups of 64 inputs
def test_shards_put_together_are_what_one_rank_quantizes(
    quantization: Any, shards: int, device: torch.device, tmp_path: Path
) -> None:
    path = save(tmp_path, projections(), {})
    one = Checkpoint(path, torch.float32, device)
    ranks = [
        ShardedCheckpoint(path, torch.float32, device, Topology(shards, 1, rank))
        for rank in range(shards)
    ]
    share = INNER // shards
    _, up = dense(one, "l.up_proj", INNER, HIDDEN, quantization)
    kind, down = dense(one, "l.down_proj", HIDDEN, INNER, quantization)
    assert kind is KINDS[quantization]
    ups = [dense(rank, "l.up_proj", share, HIDDEN, quantization) for rank in ranks]
    downs = [dense(rank, "l.down_proj", HIDDEN, share, quantization) for rank in ranks]
    assert {kind for kind, _ in ups + downs} == {KINDS[quantization]}
    assert torch.equal(torch.cat([weight for _, weight in ups]), up)
    assert torch.equal(torch.cat([weight for _, weight in downs], 1), down)


@pytest.mark.parametrize("shards", [2, 4])  # shards of 48 cut groups of 64 inputs
@pytest.mark.parametrize("act_order", [False, True])
def test_shards_of_stored_int4_are_used_as_they_are(
    act_order: bool, shards: int, device: torch.device, tmp_path: Path
) -> None:
    made = quantize(projections()["l.down_proj.weight"], 4, 64)
    group_of = torch.arange(INNER, dtype=torch.int32) // 64
    if act_order:
        group_of = group_of[torch.randperm(INNER, generator=torch.Generator().manual_seed(1))]
    stored = {
        "l.down_proj.qweight": packing.pack(made.codes(), 4).T.contiguous(),
        "l.down_proj.qzeros": torch.full((3, HIDDEN // 8), 0x77777777, dtype=torch.int32),
        "l.down_proj.scales": made.scales.T.contiguous(),
        "l.down_proj.g_idx": group_of,
    }
    path = save(tmp_path, stored, {"quantization_config": GPTQ})
    name = "l.down_proj.weight"
    whole = Checkpoint(path, torch.float32, device)(name, HIDDEN, INNER)
    for rank in range(shards):
        checkpoint = ShardedCheckpoint(path, torch.float32, device, Topology(shards, 1, rank))
        share = INNER // shards
        kind, weight = dense(checkpoint, "l.down_proj", HIDDEN, share, "int4")
        assert kind is Int4
        expected = whole[:, rank * share :][:, :share]
        if act_order:  # of an input more than once, zeros but for one
            torch.testing.assert_close(weight, expected)
        else:
            assert torch.equal(weight, expected)
