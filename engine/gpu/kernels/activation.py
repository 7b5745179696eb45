"""Gated activations: what a gated MLP has between its two products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.kernels.launch import tuned

KINDS = ("silu", "gelu", "gelu_tanh", "relu")


@triton.jit
def _activated(x, KIND: tl.constexpr):
    if KIND == "silu":
        found = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        found = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        found = x / (1.0 + tl.exp(-2.0 * inner))  # 1 + tanh(t) = 2 / (1 + exp(-2 t)), also near 0
    else:
        found = tl.maximum(x, 0.0)
    return found


@triton.jit
def _gated(
    gate_up,  # [T, 2 * size]
    out,  # [T, size]
    row_stride,
    size,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = gate_up + row * row_stride + columns
    x = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate + size, mask=inside, other=0.0).to(tl.float32)
    result = _activated(x, KIND) * up
    tl.store(out + row * size + columns, result.to(out.dtype.element_ty), mask=inside)


def gated(gate_up: Tensor, kind: str, out: Tensor | None = None) -> Tensor:
    """activation(gate) * up, computed in float32.

    gate_up [T, 2 * I]: the gates, then the ups, rows of its own stride. `kind` is one of KINDS;
    "gelu" is the exact one (erf). Returns [T, I].
    """
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] == 2 * size
    assert gate_up.stride(1) == 1
    assert kind in KINDS
    if out is None:
        out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    assert out.shape == (rows, size)
    assert out.is_contiguous()
    if not rows:
        return out
    default = {"BLOCK": 1024, "num_warps": 4}  # 16 bytes a thread of each of the two
    chosen = tuned("gated", str(size), default, gate_up.device)
    _gated[(rows, triton.cdiv(size, chosen["BLOCK"]))](
        gate_up, out, gate_up.stride(0), size, KIND=kind, **chosen
    )
    return out
