"""Gated activations against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from engine.gpu.kernels.activation import KINDS, gated

_TORCH = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _random(device: torch.device, rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(rows, size, generator=generator).mul(3).to(device, dtype)


@pytest.mark.parametrize("dtype", _TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_torchs(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    gate_up = _random(device, 3, 192, dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)  # in float32, torch's 1 + tanh cancels
    expected = (_TORCH[kind](gate) * up).to(dtype)
    tolerance = _TOLERANCE[dtype]
    torch.testing.assert_close(gated(gate_up, kind), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_large_gates_give_what_is_left_of_them(device: torch.device, kind: str) -> None:
    gate_up = torch.tensor([[60.0, -60.0, 30.0, -30.0] + [2.0] * 4], device=device)
    expected = torch.tensor([[120.0, 0.0, 60.0, 0.0]], device=device)
    torch.testing.assert_close(gated(gate_up, kind), expected, rtol=1e-6, atol=1e-6)


def test_rows_longer_than_a_program_and_apart(device: torch.device) -> None:
    wide = _random(device, 2, 2900, torch.float32)
    part = wide[:, 100:2500]
    out = torch.empty(2, 1200, device=device)
    assert gated(part, "silu", out) is out
    gate, up = part.chunk(2, dim=-1)
    torch.testing.assert_close(out, F.silu(gate) * up, rtol=2e-6, atol=2e-6)
