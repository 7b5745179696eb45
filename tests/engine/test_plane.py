"""Keys and values as int8, rounded as the compiled backend rounds them."""

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


def test_zeros_stay_zeros() -> None:
    numbers, scales = quantize(torch.zeros(2, 16))
    assert not numbers.any()
    assert not scales.any()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_leaves_the_pool_finite(broken: float) -> None:
    x = torch.ones(2, 16)
    x[0, 3] = broken
    numbers, scales = quantize(x)
    assert scales.tolist() == [0.0, pytest.approx(1 / 127)]
    assert (numbers[1] == 127).all()


def test_what_was_written_is_read_from_its_blocks() -> None:
    plane = Plane(torch.zeros(4, 2, 3, 16, dtype=torch.int8), torch.zeros(4, 2, 3))
    new = torch.randn(2, 3, 16)
    plane.write((torch.tensor([3, 1]), torch.tensor([0, 1])), new)
    found = plane.read(torch.tensor([1, 3]), torch.float32)  # [2, block_size, kv_heads, head_dim]
    torch.testing.assert_close(found[1, 0], new[0], atol=float(new.abs().max()) / 250, rtol=0)
    torch.testing.assert_close(found[0, 1], new[1], atol=float(new.abs().max()) / 250, rtol=0)
    assert not found[1, 1].any()
    assert plane.read(torch.tensor([0]), torch.bfloat16).dtype is torch.bfloat16
