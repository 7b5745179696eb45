"""Root mean square norms, alone or behind the residual addition."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.gpu.kernels.launch import tuned


@triton.jit
def _rms_norm(
    x,  # [T, H]
    residual,  # [T, H], where ADD
    weight,  # [H]
    out,  # [T, H]
    x_stride,
    size,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least H
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        there = residual + row * size + columns
        values += tl.load(there, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(residual.dtype.element_ty)
        tl.store(there, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / size + eps)
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    normalized = (values * scale * weights).to(out.dtype.element_ty)
    tl.store(out + row * size + columns, normalized, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x * weight / rms(x) over the last dimension, computed in float32.

    x [T, H] with rows of its own stride, weight [H]; out [T, H], contiguous, may be x.
    """
    return _launch(x, None, weight, eps, out)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """residual += x, in place; returns the sum's `rms_norm`.

    x, residual [T, H], the residual contiguous. The sum is rounded to the residual's format before
    it is normalized, as where the two are separate. out may be x.
    """
    assert residual.shape == x.shape
    assert residual.is_contiguous()
    return _launch(x, residual, weight, eps, out)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor | None
) -> Tensor:
    rows, size = x.shape
    assert x.stride(1) == 1
    assert weight.shape == (size,)
    if out is None:
        out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    assert out.shape == x.shape
    assert out.is_contiguous()
    if not rows:
        return out
    block = triton.next_power_of_2(size)
    # A thread holds 16 or 32 numbers: enough loads in flight, no registers spilled.
    default = {"num_warps": min(max(block // 512, 1), 16)}
    _rms_norm[(rows,)](
        x,
        x if residual is None else residual,
        weight,
        out,
        x.stride(0),
        size,
        eps,
        ADD=residual is not None,
        BLOCK=block,
        **tuned("rms_norm", str(size), default, x.device),
    )
    return out
