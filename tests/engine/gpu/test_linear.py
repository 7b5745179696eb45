"""Products of a model: the checkpoint's own format where it has one, else what is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from baton.errors import ConfigError
from engine.gpu.linear import Beside, Dense, Fp8, Int4, Int8, linear
from engine.model.weights import Checkpoint
from engine.quantization import packing
from engine.quantization.groupwise import GroupQuantized, quantize

NAMES, SIZES, INTO = ("a.q_proj", "a.k_proj"), (24, 8), 64
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [8, 32]}


def weights() -> dict[str, Tensor]:
    """Dense projections with biases."""
    random = torch.Generator().manual_seed(4)
    tensors = {}
    for name, size in zip(NAMES, SIZES, strict=True):
        tensors[f"{name}.weight"] = torch.randn(size, INTO, generator=random)
        tensors[f"{name}.bias"] = torch.randn(size, generator=random)
    return tensors


def gptq(group_of: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The same as GPTQ has them."""
    tensors = weights()
    for name in NAMES:
        made = quantize(tensors.pop(f"{name}.weight"), 4, 16)
        assert isinstance(made, GroupQuantized)
        zeros = torch.full((INTO // 16, made.shape[0]), 8, dtype=torch.uint8)
        tensors |= {
            f"{name}.qweight": packing.pack(made.codes(), 4).T.contiguous(),
            f"{name}.qzeros": packing.pack(zeros, 4),
            f"{name}.scales": made.scales.T.contiguous(),
        }
        if group_of is not None:
            tensors[f"{name}.g_idx"] = group_of[name].to(torch.int32)
    return tensors


def fp8_blocks() -> dict[str, Tensor]:
    """The same in blocks of fp8."""
    tensors, random = weights(), torch.Generator().manual_seed(6)
    for name, size in zip(NAMES, SIZES, strict=True):
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale_inv"] = torch.rand(size // 8, INTO // 32, generator=random)
    return tensors


def checkpoint(
    path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None, device: torch.device
) -> Checkpoint:
    """A directory of those."""
    found = {} if config is None else {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(found))
    save_file(tensors, path / "model.safetensors")
    return Checkpoint(path, torch.float32, device)


def assert_multiplies(made: Any, source: Checkpoint, tolerance: float, tokens: int = 3) -> None:
    """`made` is the product with the dense weights and the biases of `source`."""
    x = torch.randn(tokens, INTO, generator=torch.Generator().manual_seed(5)).to(source.device)
    sizes = list(zip(NAMES, SIZES, strict=True))
    weight = torch.cat([source(f"{name}.weight", size, INTO) for name, size in sizes])
    bias = torch.cat([source(f"{name}.bias", size) for name, size in sizes])
    expected = x @ weight.T + bias
    found, out = made(x), torch.full_like(expected, torch.nan)
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert made(x, out=out) is out
    torch.testing.assert_close(out, found)


@pytest.mark.parametrize(
    ("quantization", "kind", "tolerance", "most"),
    [
        ("none", Dense, 1e-6, 4.0),
        ("int8", Int8, 0.01, 1.1),
        ("int4", Int4, 0.12, 1.1),  # a span of 128 inputs is filled up
        ("fp8", Fp8, 0.04, 1.1),
    ],
)
def test_dense_weights_are_quantized_as_asked(
    quantization: Any,
    kind: type,
    tolerance: float,
    most: float,
    device: torch.device,
    tmp_path: Path,
) -> None:
    source = checkpoint(tmp_path, weights(), None, device)
    made = linear(source, NAMES, SIZES, INTO, True, quantization)
    assert type(made) is kind
    assert made.weight_bytes <= most * sum(SIZES) * INTO
    assert_multiplies(made, source, tolerance)


@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_stored_int4_is_used_as_it_is(
    quantization: Any, device: torch.device, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path, gptq(), GPTQ, device)
    made = linear(source, NAMES, SIZES, INTO, True, quantization)
    assert type(made) is Int4
    assert_multiplies(made, source, 1e-5)


def test_inputs_are_sorted_where_groups_are_anywhere(device: torch.device, tmp_path: Path) -> None:
    shuffled = (torch.arange(INTO) // 16)[torch.randperm(INTO)]
    source = checkpoint(tmp_path, gptq(dict.fromkeys(NAMES, shuffled)), GPTQ, device)
    made = linear(source, NAMES, SIZES, INTO, True, "none")
    assert type(made) is Int4
    assert_multiplies(made, source, 1e-5)


def test_parts_with_orders_of_their_own_are_products_beside_each_other(
    device: torch.device, tmp_path: Path
) -> None:
    groups = torch.arange(INTO) // 16
    orders = {name: groups.roll(shift) for name, shift in zip(NAMES, (1, 2), strict=True)}
    source = checkpoint(tmp_path, gptq(orders), GPTQ, device)
    made = linear(source, NAMES, SIZES, INTO, True, "none")
    assert type(made) is Beside
    spans = sum(SIZES) * 64  # of 128 inputs, four bits each
    assert made.weight_bytes == spans + sum(SIZES) * 2 * INTO // 16
    assert_multiplies(made, source, 1e-5)


@pytest.mark.parametrize(("quantization", "each"), [("none", 256), ("int4", 66)])
def test_a_part_that_is_not_quantized_stays_beside_one_that_is(
    quantization: Any, each: int, device: torch.device, tmp_path: Path
) -> None:
    tensors, plain = gptq(), NAMES[1]
    for name in ("qweight", "qzeros", "scales"):
        del tensors[f"{plain}.{name}"]
    tensors[f"{plain}.weight"] = weights()[f"{plain}.weight"]
    source = checkpoint(tmp_path, tensors, GPTQ, device)
    made = linear(source, NAMES, SIZES, INTO, True, quantization)
    assert type(made) is Beside
    assert made.weight_bytes == SIZES[0] * 72 + SIZES[1] * each
    assert_multiplies(made, source, 1e-5 if quantization == "none" else 0.06)


@pytest.mark.parametrize("quantization", ["none", "fp8"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_blocks_of_fp8_are_used_as_they_are(
    quantization: Any, tokens: int, device: torch.device, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path, fp8_blocks(), BLOCKS, device)
    made = linear(source, NAMES, SIZES, INTO, True, quantization)
    assert type(made) is Fp8
    assert made.weight_bytes == sum(SIZES) * (INTO + 4 * INTO // 32)
    assert_multiplies(made, source, 1e-5, tokens)


@pytest.mark.parametrize(("quantization", "kind"), [("none", Dense), ("fp8", Fp8)])
def test_blocks_of_fp8_that_no_product_takes_are_dense_or_made_anew(
    quantization: Any, kind: type, device: torch.device, tmp_path: Path
) -> None:
    tensors = fp8_blocks()
    for name, size in zip(NAMES, SIZES, strict=True):
        tensors[f"{name}.weight_scale_inv"] = torch.full((size // 8, 8), 0.5)
    source = checkpoint(tmp_path, tensors, BLOCKS | {"weight_block_size": [8, 8]}, device)
    made = linear(source, NAMES, SIZES, INTO, True, quantization)
    assert type(made) is kind
    assert_multiplies(made, source, 1e-5 if quantization == "none" else 0.04)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_another_quantization_than_the_stored_one_is_refused(
    quantization: Any, device: torch.device, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path, gptq(), GPTQ, device)
    with pytest.raises(ConfigError, match=f"--quantization {quantization}: .* in int4"):
        linear(source, NAMES, SIZES, INTO, True, quantization)
