"""Keys and values as int8, rounded as the compiled backend rounds them, and as float8."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.attention.plane import Plane, quantize


@settings(max_examples=60, deadline=None)
@given(
    size=st.floats(1e-20, 1e20),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_numbers_are_within_half_a_step_and_the_largest_is_127(
    size: float, seed: int, dtype: torch.dtype
) -> None:
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(seed)).mul(size).to(dtype)
    numbers, scales = quantize(x)
    assert (numbers.dtype, scales.dtype) == (torch.int8, torch.float32)
    error = (numbers.double() * scales.double()[..., None] - x.double()).abs()
    assert (error <= 0.5001 * scales.double()[..., None]).all()
    assert (numbers.int().abs().amax(-1) == 127).all()


@settings(max_examples=60, deadline=None)
@given(size=st.floats(1e-20, 1e20), seed=st.integers(0, 2**31))
def test_float8_is_within_a_sixteenth_and_the_largest_is_448(size: float, seed: int) -> None:
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(seed)).mul(size)
    numbers, scales = quantize(x, torch.float8_e4m3fn)
    assert (numbers.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    found = numbers.double() * scales.double()[..., None]
    smallest_step = 2.0**-9 * scales.double()[..., None]
    error = (found - x.double()).abs()
    assert (error <= 1.0001 * torch.maximum(x.double().abs() / 16, smallest_step / 2)).all()
    assert (numbers.float().abs().amax(-1) == 448).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    numbers, scales = quantize(torch.zeros(2, 16), dtype)
    assert not numbers.float().any()
    assert not scales.any()


@pytest.mark.parametrize(("dtype", "largest"), [(torch.int8, 127), (torch.float8_e4m3fn, 448)])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_leaves_the_pool_finite(
    broken: float, dtype: torch.dtype, largest: int
) -> None:
    x = torch.ones(2, 16)
    x[0, 3] = broken
    numbers, scales = quantize(x, dtype)
    assert numbers.float().isfinite().all()
    assert scales.tolist() == [0.0, pytest.approx(1 / largest)]
    assert (numbers[1].float() == largest).all()


@pytest.mark.parametrize(("dtype", "steps"), [(torch.int8, 250), (torch.float8_e4m3fn, 16)])
def test_what_was_written_is_read_from_its_blocks(dtype: torch.dtype, steps: int) -> None:
    plane = Plane(torch.zeros(4, 2, 3, 16).to(dtype), torch.zeros(4, 2, 3))
    new = torch.randn(2, 3, 16)
    plane.write((torch.tensor([3, 1]), torch.tensor([0, 1])), new)
    found = plane.read(torch.tensor([1, 3]), torch.float32)  # [2, block_size, kv_heads, head_dim]
    torch.testing.assert_close(found[1, 0], new[0], atol=float(new.abs().max()) / steps, rtol=0)
    torch.testing.assert_close(found[0, 1], new[1], atol=float(new.abs().max()) / steps, rtol=0)
    assert not found[1, 1].any()
    assert plane.read(torch.tensor([0]), torch.bfloat16).dtype is torch.bfloat16
