"""Products that stand for a GPU's have its weights, and the arithmetic of its kernels."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

import demo_model
from engine.gpu.kernels.matmul import SKINNY, quantize_rows
from engine.gpu.linear import linear
from engine.model.weights import Checkpoint
from engine.quantization.groupwise import quantize_fp8
from tests.engine.gpu.conftest import device, quiet_floats, rounding

__all__ = ["device", "quiet_floats", "rounding"]  # fixtures

LAYER = "model.layers.3"
KEYS, DOWN = f"{LAYER}.self_attn.k_proj", f"{LAYER}.mlp.down_proj"


@pytest.fixture
def products(importable: None) -> ModuleType:
    """benchmarks/device_products.py."""
    return importlib.import_module("benchmarks.device_products")


def inputs(tokens: int, into: int, device: torch.device) -> Tensor:
    """[tokens, into], each token of another size."""
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, into, generator=random) * torch.arange(1.0, tokens + 1)[:, None]
    return x.bfloat16().to(device)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_a_product_is_that_of_the_kernels(
    quantization: str, tokens: int, products: ModuleType, device: torch.device
) -> None:
    checkpoint = Checkpoint(demo_model.path(), torch.bfloat16, device)
    x = inputs(tokens, 256, device)
    found = products.Product(checkpoint(f"{KEYS}.weight", 128, 256), quantization)(x)
    expected = linear(checkpoint, (KEYS,), (128,), 256, False, quantization)(x)
    assert found.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-3)
    assert (found == expected).float().mean() > 0.97  # sums in another order round elsewhere


def test_groups_of_int4_are_as_large_as_on_a_gpu(
    products: ModuleType, device: torch.device
) -> None:
    checkpoint = Checkpoint(demo_model.path(), torch.bfloat16, device)
    made = linear(checkpoint, (DOWN,), (256,), 1024, False, "int4")
    scales = 256 * 1024 // products.GROUP_SIZE
    assert made.weight_bytes == 256 * 1024 // 2 + 2 * scales


def test_activations_in_fp8_are_the_kernels_from_as_many_tokens(
    products: ModuleType, device: torch.device
) -> None:
    checkpoint = Checkpoint(demo_model.path(), torch.bfloat16, device)
    weight = checkpoint(f"{DOWN}.weight", 256, 1024)
    product = products.Product(weight, "fp8 activations")
    alone = products.Product(weight, "fp8")
    few, many = (inputs(tokens, 1024, device) for tokens in (SKINNY, SKINNY + 1))
    assert torch.equal(product(few), alone(few))
    values, scales = quantize_rows(many)
    x = values.float() * scales[:, None]
    expected = (x @ quantize_fp8(weight).dequantize().T).bfloat16()
    torch.testing.assert_close(product(many), expected, rtol=2**-8, atol=1e-3)
    assert not torch.equal(product(many), alone(many))
