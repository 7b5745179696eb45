"""Weights and whole models as checkpoints store them quantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.quantization import packing
from engine.quantization.groupwise import quantize, quantize_fp8

GOLDEN = Path(__file__).parents[2] / "data" / "quantized"


@dataclass(frozen=True)
class Golden:
    """A weight `m.weight` that another project has quantized, packed and dequantized again.

    Metadata of each file says which project, its version, and by which of its functions.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    expected: Tensor  # [out, in] float32

    @classmethod
    def read(cls, name: str) -> Golden:
        """A file of tests/data/quantized."""
        with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
            config = json.loads(file.metadata()["quantization_config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return cls(config, tensors, tensors.pop("expected"))

    def save(self, path: Path) -> Path:
        """As a directory that a Checkpoint reads."""
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps({"quantization_config": self.config}))
        save_file(self.tensors, path / "model.safetensors")
        return path


NAMES = sorted(file.stem for file in GOLDEN.glob("*.safetensors"))


def _int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [out, in] uint8 of groups of 16 inputs and their scales; what is nearest, no search."""
    groups = weight.float().view(len(weight), -1, 16)
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scales[..., None].float()).round().clamp(-8, 7) + 8
    return codes.view(weight.shape).to(torch.uint8), scales


def _gptq(weight: Tensor, act_order: bool) -> dict[str, Tensor]:
    codes, scales = _int4(weight)
    into = weight.shape[1]
    group_of = torch.arange(into, dtype=torch.int32) // 16
    if act_order:  # inputs anywhere, as long as their group is named
        shuffled = torch.randperm(into, generator=torch.Generator().manual_seed(1))
        codes, group_of = codes[:, shuffled], group_of[shuffled]
    zeros = torch.full((into // 16, len(weight)), 7, dtype=torch.uint8)  # one less, version 1
    return {
        "qweight": packing.pack(codes, 4).T.contiguous(),
        "qzeros": packing.pack(zeros, 4),
        "scales": scales.T.contiguous(),
        "g_idx": group_of,
    }


def _awq(weight: Tensor) -> dict[str, Tensor]:
    codes, scales = _int4(weight)
    zeros = torch.full((weight.shape[1] // 16, len(weight)), 8, dtype=torch.uint8)
    return {
        "qweight": packing.pack(packing.to_awq(codes.T.contiguous()), 4),
        "qzeros": packing.pack(packing.to_awq(zeros), 4),
        "scales": scales.T.contiguous(),
    }


def _packed(weight: Tensor) -> dict[str, Tensor]:
    codes, scales = _int4(weight)
    return {
        "weight_packed": packing.pack(codes, 4),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }


def _int8(weight: Tensor) -> dict[str, Tensor]:
    made = quantize(weight, 8, weight.shape[1])
    return {"weight": made.packed, "weight_scale": made.scales}


def _fp8(weight: Tensor) -> dict[str, Tensor]:
    made = quantize_fp8(weight)
    return {"weight": made.values, "weight_scale": made.scales}


def _fp8_blocks(weight: Tensor) -> dict[str, Tensor]:
    blocks = weight.float().unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
    scales = blocks.abs().amax((1, 3)) / 448  # [blocks of outputs, blocks of inputs]
    values = (blocks / scales[:, None, :, None]).view(weight.shape)
    return {"weight": values.to(torch.float8_e4m3fn), "weight_scale_inv": scales}


def _compressed(fmt: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": fmt,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True}
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Tensor], dict[str, Tensor]], str]] = {
    "gptq": (_GPTQ, lambda weight: _gptq(weight, False), "int4"),
    "gptq-act-order": (_GPTQ | {"desc_act": True}, lambda weight: _gptq(weight, True), "int4"),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16}, _awq, "int4"),
    "compressed-int4": (
        _compressed("pack-quantized", num_bits=4, strategy="group", group_size=16),
        _packed,
        "int4",
    ),
    "compressed-int8": (_compressed("int-quantized", strategy="channel"), _int8, "int8"),
    "compressed-fp8": (
        _compressed("float-quantized", type="float", strategy="channel"),
        _fp8,
        "fp8",
    ),
    "fp8-blocks": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, _fp8_blocks, "fp8"),
}


def quantized_copy(source: Path, target: Path, name: str) -> Path:
    """A model directory with the projections of its layers in a format of FORMATS."""
    config, store, _ = FORMATS[name]
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        module = key.removesuffix(".weight")
        stored = store(tensors.pop(key))
        tensors |= {f"{module}.{suffix}": found for suffix, found in stored.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    file = target / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    return target


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """`Golden.read`."""
    return Golden.read


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`golden_name`: every file of tests/data/quantized; `format_name`: every one of FORMATS."""
    if "golden_name" in metafunc.fixturenames:
        metafunc.parametrize("golden_name", NAMES)
    if "format_name" in metafunc.fixturenames:
        metafunc.parametrize("format_name", list(FORMATS))


@pytest.fixture(scope="session")
def quantize_model() -> Callable[[Path, Path, str], Path]:
    """`quantized_copy`."""
    return quantized_copy


@pytest.fixture(scope="session")
def stored_as() -> Callable[[str], str]:
    """What a format's weights are called."""
    return lambda name: FORMATS[name][2]
