"""Tensors read where they lie in their file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from baton.errors import ModelError
from engine.model.mapped import MappedFile
from engine.model.weights import Checkpoint

TENSORS = {
    "wide": torch.arange(6000, dtype=torch.float32).view(60, 100),
    "half": torch.arange(64, dtype=torch.bfloat16),
    "short": torch.arange(6, dtype=torch.float16).view(2, 3),
    "whole": torch.arange(4),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A directory with those tensors."""
    save_file(TENSORS, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path, torch.float32)


@pytest.mark.parametrize("name", ["wide", "half", "short"])
def test_a_mapped_tensor_has_its_stored_dtype_and_is_no_copy(
    name: str, checkpoint: Checkpoint
) -> None:
    stored = TENSORS[name]
    first, again = (checkpoint.mapped(name, *stored.shape) for _ in range(2))
    assert first.dtype is stored.dtype
    assert torch.equal(first, stored)
    assert first.data_ptr() == again.data_ptr()
    assert checkpoint(name, *stored.shape).dtype is torch.float32


def test_a_forgotten_tensor_is_read_again(checkpoint: Checkpoint) -> None:
    tensor = checkpoint.mapped("wide", 60, 100)
    assert torch.equal(tensor, TENSORS["wide"])
    checkpoint.forget("wide")
    assert torch.equal(tensor, TENSORS["wide"])


def test_a_mapped_tensor_outlives_its_checkpoint(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    tensor = Checkpoint(tmp_path).mapped("wide", 60, 100)
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(tensor, TENSORS["wide"])


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("absent", (1,), "'absent' is missing"),
        ("half", (63,), r"'half' has shape \(64,\), .* \(63,\)"),
        ("whole", (4,), "'whole' holds"),
    ],
)
def test_what_a_copy_refuses_is_refused_mapped_too(
    name: str, shape: tuple[int, ...], reason: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(ModelError, match=reason):
        checkpoint.mapped(name, *shape)
    with pytest.raises(ModelError, match=reason):
        checkpoint(name, *shape)


@pytest.mark.parametrize("padding", range(4))
def test_a_misaligned_tensor_is_copied_to_where_it_can_be_read(
    padding: int, tmp_path: Path
) -> None:
    values: Tensor = torch.arange(5, dtype=torch.float32)
    entry = {"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}
    header = json.dumps(entry).encode()
    header += b" " * (-len(header) % 4 + padding)
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    tensor = MappedFile(file).tensor("a")
    assert tensor.data_ptr() % 4 == 0
    assert torch.equal(tensor, values)
