"""The building blocks of the native models: plain objects with weights, called on flat tokens.

Not torch modules: there is nothing to train, and a pass calls hundreds of them, so each call is as
thin as torch allows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN

from baton.errors import ModelError
from engine.model.config import ModelConfig

Activation = Callable[[Tensor], Tensor]


def activation(config: ModelConfig, name: str) -> Activation:
    """An activation by the name that transformers gives it. Raises ModelError if it has none."""
    if name not in ACT2FN:
        raise ModelError(f"{config.path}: activation {name!r} is not known")
    found: Activation = ACT2FN[name]
    return found


class Linear:
    """x [T, in] -> [T, out]. On a CPU the weight is kept in oneDNN's own packing, which saves
    reordering it in every pass (1.3 to 3 times faster, measured at 1 to 256 tokens)."""

    __slots__ = ("_bias", "_product", "_weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight [out, in], bias [out]."""
        self._bias = bias
        if _packable(weight):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            self._product = _packed_product()
        else:
            self._weight = weight
            self._product = F.linear

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self._weight, self._bias)


def _packed_product() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    operator = torch.ops.mkldnn._linear_pointwise.default
    return lambda x, weight, bias: operator(x, weight, bias, "none", [], "")


def _packable(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


class RmsNorm:
    """x * weight / rms(x) over the last dimension, computed in float32."""

    __slots__ = ("eps", "shape", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps
        self.shape = (weight.shape[-1],)

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, self.weight, self.eps)


class LayerNorm:
    """Layer normalization over the last dimension; weight and bias are optional."""

    __slots__ = ("bias", "shape", "weight")

    def __init__(self, size: int, weight: Tensor | None, bias: Tensor | None) -> None:
        self.shape, self.weight, self.bias = (size,), weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias)


class GatedMlp:
    """down(activation(gate(x)) * up(x)), with gate and up as one product."""

    __slots__ = ("activation", "down", "gate_up")

    def __init__(self, gate_up: Linear, down: Linear, activation: Activation) -> None:
        self.gate_up, self.down, self.activation = gate_up, down, activation

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate).mul_(up))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + dim/2) of the last axis by its position's angle.

    x [T, heads, dim]; cos, sin [T, 1, dim], the first half of `sin` negated, so that the rotation
    is two products with x and x's halves swapped.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
