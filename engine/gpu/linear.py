"""The products of a model on a GPU, by the format of their weights.

Projections that read the same input are one product: their weights are put one below the other.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from baton.errors import ConfigError
from engine.gpu.kernels.matmul import (
    matmul_fp8,
    matmul_int4,
    matmul_int8,
    pack_int4,
    supports_int4,
    supports_int8,
)
from engine.model.weights import Checkpoint
from engine.quantization.groupwise import (
    Fp8Quantized,
    GroupQuantized,
    concatenated,
    quantize,
    quantize_fp8,
)
from engine.quantization.stored import narrowed

_logger = logging.getLogger(__name__)

_GROUP_SIZES = (128, 64, 32, 16)  # of int4 that is made here, the first that divides the inputs


class GpuLinear(Protocol):
    """x [T, in] -> x W^T + bias [T, out], in x's format."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights and scales that a product reads."""
        ...

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The product; into `out`, contiguous, if given."""
        ...


class Dense:
    """Weights in the format of the activations."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight [out, in], bias [out]."""
        self._weight, self._bias = weight, bias

    @property
    def weight_bytes(self) -> int:
        """Bytes that a product reads."""
        return self._weight.nbytes

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]."""
        if out is None:
            return F.linear(x, self._weight, self._bias)
        if self._bias is None:
            return torch.mm(x, self._weight.t(), out=out)
        return torch.addmm(self._bias, x, self._weight.t(), out=out)


class Int8:
    """Weights in int8, with a scale per output or per group of inputs."""

    def __init__(self, weight: GroupQuantized, bias: Tensor | None = None) -> None:
        """Of 8 bits, in groups that `supports_int8` has."""
        assert weight.bits == 8
        self._values, self._scales = weight.packed.contiguous(), weight.scales.contiguous()
        self._zeros = weight.zeros
        self._order, self._bias = weight.order, bias

    @property
    def weight_bytes(self) -> int:
        """Bytes that a product reads."""
        return _bytes(self._values, self._scales, self._zeros)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]."""
        x = _sorted(x, self._order)
        return matmul_int8(x, self._values, self._scales, self._zeros, self._bias, out)


class Int4:
    """Weights in four bits, with scales per group of inputs."""

    def __init__(self, weight: GroupQuantized, bias: Tensor | None = None) -> None:
        """Of 4 bits, in groups that `supports_int4` has."""
        assert weight.bits == 4
        self._words, self._scales = pack_int4(weight.codes()), weight.scales.contiguous()
        self._zeros, self._group_size = weight.zeros, weight.group_size
        self._order, self._bias = weight.order, bias

    @property
    def weight_bytes(self) -> int:
        """Bytes that a product reads."""
        return _bytes(self._words, self._scales, self._zeros)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]."""
        x = _sorted(x, self._order)
        return matmul_int4(
            x, self._words, self._scales, self._zeros, self._group_size, self._bias, out
        )


class Fp8:
    """Weights in fp8, with a scale per output or per group of inputs; activations too where there
    is one per output and that pays."""

    def __init__(self, weight: Fp8Quantized, bias: Tensor | None = None) -> None:
        self._values, self._scales = weight.values.contiguous(), weight.scales.contiguous()
        self._bias = bias

    @property
    def weight_bytes(self) -> int:
        """Bytes that a product reads."""
        return _bytes(self._values, self._scales, None)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]."""
        return matmul_fp8(x, self._values, self._scales, self._bias, out)


class Beside:
    """Products of the same inputs whose weights have different formats."""

    def __init__(self, products: Sequence[GpuLinear]) -> None:
        self._products = products

    @property
    def weight_bytes(self) -> int:
        """Bytes that a product reads."""
        return sum(product.weight_bytes for product in self._products)

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [T, in] -> [T, out]."""
        return torch.cat([product(x) for product in self._products], 1, out=out)


def linear(
    checkpoint: Checkpoint,
    names: Sequence[str],
    sizes: Sequence[int],
    into: int,
    biases: bool,
    quantization: str,
) -> GpuLinear:
    """The projections `names` ("model.layers.0.mlp.up_proj") of `sizes` outputs as one product, or
    as one each where only that keeps what is stored.

    Weights that the checkpoint has quantized stay as they are stored, if kernels can use that.
    `quantization` is "none", or what the others become: "int8", "int4" or "fp8". `biases`: whether
    they have any. Raises ConfigError if `quantization` is not what is stored, and ModelError as the
    checkpoint does.
    """
    parts = [(f"{name}.weight", size) for name, size in zip(names, sizes, strict=True)]
    _check(checkpoint, parts, quantization)
    bias = None
    if biases:
        bias = torch.cat(
            [checkpoint(f"{name}.bias", size) for name, size in zip(names, sizes, strict=True)]
        )
    stored = [checkpoint.quantized(name, size, into) for name, size in parts]
    usable = [weight is not None and _usable(weight) for weight in stored]
    together = _together(stored) if all(usable) else None
    if together is not None:
        return _of(together, bias)
    if any(usable) and len(parts) > 1:
        _logger.info("%s: a product for each of its parts, whose formats differ", parts[0][0])
        return Beside(
            [
                linear(checkpoint, (name,), (size,), into, biases, quantization)
                for name, size in zip(names, sizes, strict=True)
            ]
        )
    if any(checkpoint.is_quantized(name) for name, _ in parts):
        _logger.info("%s: no product takes it as it is stored; dense weights", parts[0][0])
    if quantization == "none":
        return Dense(torch.cat([checkpoint(name, size, into) for name, size in parts]), bias)
    made = _together([_made(checkpoint, name, size, into, quantization) for name, size in parts])
    assert made is not None
    return _of(made, bias)


def _made(
    checkpoint: Checkpoint, name: str, out: int, into: int, quantization: str
) -> GroupQuantized | Fp8Quantized:
    """Weight `name` [out, in], quantized. On several ranks each has a part of what one would have,
    scales included."""
    weight, inputs = checkpoint.with_all_inputs(name, out, into)
    whole: GroupQuantized | Fp8Quantized
    if quantization == "fp8":
        whole = quantize_fp8(weight)
    elif quantization == "int8":
        whole = quantize(weight, 8, weight.shape[1])
    else:
        size = next((size for size in _GROUP_SIZES if weight.shape[1] % size == 0), 0)
        whole = quantize(weight, 4, size or weight.shape[1])
    if len(inputs) == weight.shape[1]:
        return whole
    part = narrowed(whole, inputs)
    assert part is not None  # there are no blocks
    return part


def _check(checkpoint: Checkpoint, parts: Sequence[tuple[str, int]], quantization: str) -> None:
    for name, _ in parts:
        if quantization == "none" or checkpoint.scheme is None or not checkpoint.is_quantized(name):
            continue
        form = checkpoint.scheme.form(name.removesuffix(".weight"))
        if form is not None and form.name != quantization:
            raise ConfigError(
                f"--quantization {quantization}: {checkpoint.path} has its weights in {form.name}"
            )


def _together(
    parts: Sequence[GroupQuantized | Fp8Quantized | None],
) -> GroupQuantized | Fp8Quantized | None:
    """Weights of the same inputs, one below the other; None if their formats differ."""
    groups = [part for part in parts if isinstance(part, GroupQuantized)]
    if len(groups) == len(parts):
        return concatenated(groups)
    floats = [part for part in parts if isinstance(part, Fp8Quantized)]
    if len(floats) < len(parts) or len({part.scales.shape[1] for part in floats}) > 1:
        return None
    values = torch.cat([part.values.view(torch.uint8) for part in floats])
    scales = torch.cat([part.scales for part in floats])
    return Fp8Quantized(values.view(torch.float8_e4m3fn), scales)


def _usable(weight: GroupQuantized | Fp8Quantized) -> bool:
    if isinstance(weight, Fp8Quantized):
        into = weight.shape[1]
        return supports_int8(into, into // weight.scales.shape[1])
    supports = supports_int4 if weight.bits == 4 else supports_int8
    return supports(weight.columns, weight.group_size)


def _of(weight: GroupQuantized | Fp8Quantized, bias: Tensor | None) -> GpuLinear:
    if isinstance(weight, Fp8Quantized):
        return Fp8(weight, bias)
    return Int4(weight, bias) if weight.bits == 4 else Int8(weight, bias)


def _sorted(x: Tensor, order: Tensor | None) -> Tensor:
    """Inputs in the order of the weights' groups."""
    return x if order is None else x.index_select(1, order)


def _bytes(weight: Tensor, scales: Tensor, zeros: Tensor | None) -> int:
    return weight.nbytes + scales.nbytes + (0 if zeros is None else zeros.nbytes)
