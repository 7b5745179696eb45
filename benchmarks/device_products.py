"""What a GPU makes of quantized weights, in torch on a CPU.

engine/gpu/linear.py has its weights from engine/quantization, and its kernels say how they multiply
them. Both are done here for a model that torch runs, so that accuracy can be measured where there
is no GPU and no Triton. What remains different is the order of sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.llama import Llama
from engine.model.weights import Checkpoint
from engine.quantization.groupwise import quantize, quantize_fp8

GROUP_SIZE = 128  # of int4; engine/gpu/linear.py takes smaller ones where this is no divisor
SKINNY = 16  # tokens up to which activations stay as they are
FORMATS = ("int8", "int4", "fp8", "fp8 activations")


class Product:
    """x [T, in] -> x W^T [T, out], summed in float32 and rounded to x's format."""

    def __init__(self, weight: Tensor, quantization: str) -> None:
        """weight [out, in] in x's format; quantization one of FORMATS."""
        self._activations = quantization == "fp8 activations"
        self._scales: Tensor | None = None  # [out] float32, of the sums
        if quantization == "int4":
            self._weight = quantize(weight, 4, GROUP_SIZE).dequantize()
        elif quantization == "int8":
            integers = quantize(weight, 8, weight.shape[1])
            self._weight = integers.packed.float()
            self._scales = integers.scales[:, 0].float()
        else:
            floats = quantize_fp8(weight)
            self._weight, self._scales = floats.values.float(), floats.scales[:, 0]
        self._tiled = self._weight.to(weight.dtype).float()  # tiles multiply in x's format

    def __call__(self, x: Tensor) -> Tensor:
        """One product."""
        wide, rows = x.float(), None
        if self._activations and len(x) > SKINNY:
            numbers = quantize_fp8(x)
            wide, rows = numbers.values.float(), numbers.scales
        found = wide @ (self._weight if len(x) == 1 else self._tiled).T
        if self._scales is not None:
            found *= self._scales
        if rows is not None:
            found *= rows
        return found.to(x.dtype)


def replace_products(model: Llama, checkpoint: Checkpoint, quantization: str) -> None:
    """Have the layers of `model`, which is of `checkpoint` and has no biases, multiply so. The head
    stays as it is."""

    def product(*names: str) -> Product:
        shapes = [checkpoint.stored_shape(name) for name in names]
        parts = [checkpoint(name, *shape) for name, shape in zip(names, shapes, strict=True)]
        return Product(torch.cat(parts), quantization)

    for index, layer in enumerate(model._layers):
        attention, mlp = (f"model.layers.{index}.{part}" for part in ("self_attn", "mlp"))
        layer._qkv = product(*(f"{attention}.{name}_proj.weight" for name in "qkv"))
        layer._output = product(f"{attention}.o_proj.weight")
        layer._mlp.gate_up = product(f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
        layer._mlp.down = product(f"{mlp}.down_proj.weight")
