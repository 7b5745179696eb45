"""Weights made into integers and fp8 stay as close to what they were as their bits allow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.quantization.groupwise import concatenated, quantize, quantize_fp8


@pytest.fixture
def weight() -> Tensor:
    """Of a few outputs, one of them large, one of them zero."""
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(2))
    weight[1] *= 1000
    weight[2] = 0
    return weight


def absolute_largest(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """The plain way: the largest weight of a group gets the outermost of the codes."""
    groups = weight.view(len(weight), -1, group_size)
    levels = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True) / levels
    scale = scale.where(scale > 0, 1.0)
    return ((groups / scale).round() * scale).view_as(weight)


@pytest.mark.parametrize("group_size", [16, 32, 96])
def test_the_search_beats_the_scale_of_the_largest_weight(weight: Tensor, group_size: int) -> None:
    found = quantize(weight, 4, group_size).dequantize()
    error = (found - weight).square().sum(1)
    plain = (absolute_largest(weight, 4, group_size) - weight).square().sum(1)
    assert (error <= plain).all()
    assert error.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize(("bits", "relative"), [(4, 0.11), (8, 0.008)])
def test_the_error_is_that_of_the_bits(weight: Tensor, bits: int, relative: float) -> None:
    found = quantize(weight, bits, 32).dequantize()
    for row in (0, 1, 3):
        assert (found[row] - weight[row]).norm() < relative * weight[row].norm()
    assert not found[2].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_what_the_format_can_hold_is_kept_exactly(bits: int) -> None:
    levels = 2 ** (bits - 1)
    weight = torch.arange(-levels, levels).float().repeat(2, 2) * 0.25
    found = quantize(weight, bits, 2 * levels)
    assert torch.equal(found.dequantize(), weight)
    assert found.packed.nbytes == weight.numel() * bits // 8


def test_an_odd_number_of_inputs_is_packed(weight: Tensor) -> None:
    narrow = weight[:, :33]
    found = quantize(narrow, 4, 33)
    assert found.packed.shape == (6, 17)
    assert found.dequantize().shape == (6, 33)


def test_fp8_keeps_its_relative_precision(weight: Tensor) -> None:
    found = quantize_fp8(weight)
    assert found.values.float().abs().amax(1).tolist() == [448, 448, 0, 448, 448, 448]
    error = (found.dequantize() - weight).abs()
    # Half of a step of three bits, or of the smallest step that there is.
    allowed = torch.maximum(weight.abs() * 2**-4, found.scales * 2**-10)
    assert (error <= allowed * 1.001).all()


def test_weights_of_the_same_inputs_are_put_together(weight: Tensor) -> None:
    parts = [quantize(weight[:4], 4, 32), quantize(weight[4:], 4, 32)]
    whole = concatenated(parts)
    assert whole is not None
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert concatenated([parts[0], quantize(weight, 4, 16)]) is None
    assert concatenated([parts[0], quantize(weight, 8, 32)]) is None
