"""Norms against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from engine.gpu.kernels.norm import add_rms_norm, rms_norm

_EPS = 1e-5
# A product of float32 numbers, rounded once: the last digit may differ where torch rounds twice.
_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


@pytest.mark.parametrize("dtype", _TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [64, 80])
def test_norm_is_torchs(device: torch.device, dtype: torch.dtype, size: int) -> None:
    x, weight = _random(device, 3, size, dtype=dtype), _random(device, size, dtype=dtype)
    expected = F.rms_norm(x.float(), (size,), weight.float(), _EPS).to(dtype)
    torch.testing.assert_close(
        rms_norm(x, weight, _EPS), expected, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", _TOLERANCE, ids=str)
def test_sum_is_kept_and_normalized(device: torch.device, dtype: torch.dtype) -> None:
    x, residual = _random(device, 5, 96, dtype=dtype), _random(device, 5, 96, dtype=dtype).flip(0)
    weight = _random(device, 96, dtype=dtype)
    total = x + residual
    normalized = add_rms_norm(x, residual, weight, _EPS)
    assert torch.equal(residual, total)
    expected = F.rms_norm(total.float(), (96,), weight.float(), _EPS).to(dtype)
    torch.testing.assert_close(normalized, expected, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype])


def test_result_goes_where_it_is_wanted(device: torch.device) -> None:
    x, weight = _random(device, 2, 32), _random(device, 32)
    expected = rms_norm(x, weight, _EPS)
    out = torch.empty_like(x)
    assert rms_norm(x, weight, _EPS, out) is out
    assert torch.equal(out, expected)
    rms_norm(x, weight, _EPS, x)
    assert torch.equal(x, expected)


def test_rows_may_lie_apart(device: torch.device) -> None:
    wide, weight = _random(device, 4, 96), _random(device, 32)
    part = wide[:, 32:64]
    assert torch.equal(rms_norm(part, weight, _EPS), rms_norm(part.contiguous(), weight, _EPS))


def test_no_rows_give_no_rows(device: torch.device) -> None:
    assert rms_norm(_random(device, 0, 32), _random(device, 32), _EPS).shape == (0, 32)
