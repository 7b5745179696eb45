"""How weights become four bits: on a grid per group of 32, chosen for the least squared error."""

from __future__ import annotations

import pytest
import torch

from engine.native.library import Format, Library
from engine.quantization.groupwise import quantize
from tests.engine.native.conftest import TeamOf
from tests.engine.native.test_gemm import multiply, operands, packed_int4

GROUP = 32


def nearest(w: torch.Tensor) -> torch.Tensor:
    """Each group rounded to the 15 even multiples of max / 7."""
    groups = w.view(len(w), -1, GROUP)
    scales = groups.abs().amax(-1, keepdim=True) / 7
    return (torch.round(groups / scales) * scales).view_as(w)


def error(found: torch.Tensor, w: torch.Tensor) -> float:
    """The norm of the difference, as a part of the norm of w."""
    return ((found - w).norm() / w.norm()).item()


def test_weights_on_the_grid_come_back(library: Library, team: TeamOf) -> None:
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randint(0, 16, (40, 6, GROUP), generator=generator)
    numbers[:, :, 0], numbers[:, :, 1] = 0, 15  # no group uses less than its grid
    zeros = torch.randint(5, 11, (40, 6, 1), generator=generator)
    steps = torch.randint(1, 12, (40, 6, 1), generator=generator)
    zeros[:, 3], steps[:, 3] = 8, 15  # the widest, from which a row's scale follows
    w = ((numbers - zeros) * steps).view(40, -1) * 0.0123
    torch.testing.assert_close(packed_int4(library, team(2), w), w, rtol=1e-5, atol=1e-6)


def test_the_search_beats_rounding_to_the_nearest(library: Library, team: TeamOf) -> None:
    _, w = operands(1, 64, 896)
    found = error(packed_int4(library, team(2), w), w)
    assert found < 0.85 * error(nearest(w), w)
    assert found < 0.085


def test_groups_to_one_side_of_zero_use_all_numbers(library: Library, team: TeamOf) -> None:
    _, w = operands(1, 64, 256)
    w = w.abs()
    assert error(packed_int4(library, team(2), w), w) < 0.6 * error(nearest(w), w)


def test_a_large_group_leaves_the_others_their_precision(library: Library, team: TeamOf) -> None:
    _, w = operands(1, 64, 320)
    w[:, 64:96] *= 4
    found = packed_int4(library, team(2), w)
    others = torch.cat((w[:, :64], w[:, 96:]), 1)
    assert error(torch.cat((found[:, :64], found[:, 96:]), 1), others) < 0.1


@pytest.mark.parametrize("k", [1, 31, 33, 48, 95])
def test_a_last_group_may_be_short(library: Library, team: TeamOf, k: int) -> None:
    _, w = operands(1, 40, k)
    assert error(packed_int4(library, team(1), w), w) < 0.1


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30])
def test_tiny_and_huge_weights_keep_their_size(library: Library, team: TeamOf, size: float) -> None:
    x, w = operands(3, 40, 96)
    y = multiply(library, team(1), library.isa, Format.INT4, x, w * size)
    assert bool(y.isfinite().all())
    if size > 1e-37:  # else some are subnormal
        assert error(y / size, x @ w.T) < 0.15


def test_weights_in_four_bits_are_kept_in_eight_and_not_in_four_of_another_kind(
    library: Library, team: TeamOf
) -> None:
    """What docs/quantization.md says of checkpoints that are packed anew."""
    w = torch.randn(128, 1024, generator=torch.Generator().manual_seed(1))
    stored = quantize(w, 4, 128).dequantize()
    lost, units = error(stored, w), torch.eye(1024)
    assert 0.09 < lost < 0.10
    eight = multiply(library, team(2), library.isa, Format.INT8, units, stored).T
    assert error(eight, stored) < 0.01
    assert error(eight, w) < 1.01 * lost
    four = packed_int4(library, team(2), stored)
    assert 1.1 * lost < error(four, w) < 1.25 * lost
