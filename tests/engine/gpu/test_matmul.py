"""Products with quantized weights are those with the dense weights that they mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.gpu.kernels import matmul
from engine.gpu.kernels.matmul import (
    matmul_fp8,
    matmul_int4,
    matmul_int8,
    pack_int4,
    quantize_rows,
)
from engine.quantization.groupwise import quantize, quantize_fp8

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}


def random(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    """Normal numbers, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def assert_product(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """`found` is x @ weight.T + bias, but for the rounding of its format."""
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    allowed = ROUNDING[x.dtype] * expected.abs().amax()
    assert found.dtype is x.dtype
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group_size", "asymmetric"),
    [
        (24, 256, 128, False),
        (17, 256, 32, True),
        (24, 192, 64, True),
        (16, 80, 16, False),
        (24, 200, 200, True),
        (8, 1280, 256, True),
    ],
)
def test_int4(
    tokens: int,
    outputs: int,
    inputs: int,
    group_size: int,
    asymmetric: bool,
    device: torch.device,
) -> None:
    x = random(tokens, inputs, device=device)
    made = quantize(random(outputs, inputs, device=device, seed=1), 4, group_size)
    codes, scales = made.codes(), made.scales
    zeros = None
    if asymmetric:
        zeros = (random(*scales.shape, device=device, seed=2).abs() * 5).to(torch.uint8)
    middle = zeros.float() if zeros is not None else torch.full_like(scales.float(), 8)
    by_input = [part.repeat_interleave(group_size, 1) for part in (scales.float(), middle)]
    weight = (codes.float() - by_input[1]) * by_input[0]
    found = matmul_int4(x, pack_int4(codes), scales, zeros, group_size)
    assert_product(found, x, weight, None)


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [
        (1, torch.bfloat16),
        (1, torch.float16),
        (5, torch.float16),
        # The interpreter's dot takes the bits of bfloat16 for integers.
        pytest.param(5, torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_int4_in_half_precision_with_a_bias(
    tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = random(tokens, 256, device=device).to(dtype)
    bias = random(40, device=device, seed=3).to(dtype)
    made = quantize(random(40, 256, device=device, seed=1), 4, 64)
    found = matmul_int4(x, pack_int4(made.codes()), made.scales, None, 64, bias)
    assert_product(found, x, made.dequantize(), bias)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group_size", "asymmetric"),
    [(24, 256, 256, False), (17, 200, 200, True), (24, 96, 32, True), (24, 256, 128, False)],
)
def test_int8(
    tokens: int,
    outputs: int,
    inputs: int,
    group_size: int,
    asymmetric: bool,
    device: torch.device,
) -> None:
    x, bias = random(tokens, inputs, device=device), random(outputs, device=device, seed=3)
    made = quantize(random(outputs, inputs, device=device, seed=1), 8, group_size)
    values, scales = made.packed, made.scales
    zeros, middle = None, torch.zeros_like(scales.float())
    if asymmetric:
        zeros = (128 + random(*scales.shape, device=device, seed=2) * 9).to(torch.uint8)
        middle = zeros.float() - 128
    by_input = [part.repeat_interleave(group_size, 1) for part in (scales.float(), middle)]
    weight = (values.float() - by_input[1]) * by_input[0]
    assert_product(matmul_int8(x, values, scales, zeros, bias), x, weight, bias)


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_fp8(tokens: int, device: torch.device) -> None:
    x, bias = random(tokens, 208, device=device), random(24, device=device, seed=3)
    made = quantize_fp8(random(24, 208, device=device, seed=1))
    found = matmul_fp8(x, made.values, made.scales, bias)
    assert_product(found, x, made.dequantize(), bias)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [17, 100])
@pytest.mark.parametrize("biased", [False, True])
def test_many_tokens_are_multiplied_in_fp8_by_devices_that_can_in_graphs_too(
    tokens: int, biased: bool, device: torch.device
) -> None:
    if not matmul.supports_fp8(device):
        pytest.skip("the device has no fp8")
    x = random(tokens, 256, device=device).bfloat16()
    bias = random(48, device=device, seed=3).bfloat16() if biased else None
    made = quantize_fp8(random(48, 256, device=device, seed=1))
    found = matmul_fp8(x, made.values, made.scales, bias)
    numbers, scales = quantize_rows(x)
    rounded = numbers.double() * scales.double()[:, None]
    expected = rounded @ made.dequantize().double().T
    if bias is not None:
        expected += bias.double()
    assert found.dtype is torch.bfloat16
    assert (found.double() - expected).abs().max() <= 6e-3 * expected.abs().max()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = matmul_fp8(x, made.values, made.scales, bias)
    graph.replay()
    assert torch.equal(again, found)


def test_every_fp8_number_is_read_as_what_it_is(device: torch.device) -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    bits[[0x7F, 0xFF]] = 0  # not numbers
    values = bits.view(torch.float8_e4m3fn).repeat(2, 1).to(device)
    scales = torch.tensor([1.0, 3.0], device=device)
    for column in (*range(0, 256, 17), 1, 7, 8, 129, 254):
        x = torch.zeros(1, 256, device=device)
        x[0, column] = 1
        expected = values[:, column].float() * scales
        assert torch.equal(matmul_fp8(x, values, scales[:, None])[0], expected)


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_sum_in_parts_is_the_same_every_time(
    tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, bias = random(tokens, 2048, device=device), random(8, device=device, seed=3)
    made = quantize(random(8, 2048, device=device, seed=1), 4, 128)
    words = pack_int4(made.codes())
    split = [matmul_int4(x, words, made.scales, None, 128, bias) for _ in range(2)]
    monkeypatch.setattr(matmul, "_MOST_SPLITS", 1)
    whole = matmul_int4(x, words, made.scales, None, 128, bias)
    assert torch.equal(split[0], split[1])
    assert not torch.equal(split[0], whole)  # or nothing was split
    assert_product(split[0], x, made.dequantize(), bias)
    assert_product(whole, x, made.dequantize(), bias)


def test_rows_of_their_own_stride_and_an_output_that_is_given(device: torch.device) -> None:
    wide = random(4, 512, device=device)
    x, out = wide[:, 256:], torch.full((4, 24), torch.nan, device=device)
    made = quantize(random(24, 256, device=device, seed=1), 4, 128)
    assert matmul_int4(x, pack_int4(made.codes()), made.scales, None, 128, None, out) is out
    assert_product(out, x, made.dequantize(), None)
    eight = quantize(random(24, 256, device=device, seed=1), 8, 256)
    assert matmul_int8(x, eight.packed, eight.scales, out=out) is out
    assert_product(out, x, eight.dequantize(), None)


def test_no_tokens_give_no_rows(device: torch.device) -> None:
    made = quantize(random(24, 256, device=device, seed=1), 8, 256)
    x = torch.empty(0, 256, device=device)
    assert matmul_int8(x, made.packed, made.scales).shape == (0, 24)


def test_words_hold_16_inputs_in_each_of_their_nibbles() -> None:
    codes = (torch.arange(128) // 16).to(torch.uint8)[None]
    assert pack_int4(codes).tolist() == [[0x76543210] * 16]
    lanes = (torch.arange(128) % 16).to(torch.uint8)[None]
    first = pack_int4(lanes).tolist()[0]
    assert first[:3] == [0, 0x11111111, 0x22222222]


def test_rows_are_quantized_to_fp8_as_torch_does(device: torch.device) -> None:
    if device.type == "cuda" and not matmul.supports_fp8(device):
        pytest.skip("the device has no fp8")
    x = random(4, 5000, device=device) * torch.tensor([[1.0], [1e-3], [300.0], [0.0]]).to(device)
    values, scales = quantize_rows(x)
    expected = quantize_fp8(x)
    torch.testing.assert_close(scales[:, None], expected.scales)
    same = values.view(torch.uint8) == expected.values.view(torch.uint8)
    assert same.float().mean() > 0.999  # a quotient may round the other way
    assert (values.float() * scales[:, None] - x).abs().max() <= x.abs().max() / 28
