"""Quantized weights of a checkpoint: what its tensors mean.

A weight `a.b.weight` that the configuration of a model asks for may be stored under other names
and in another layout. Here it is read, checked, and given as dense floats or in the form that
products use (groupwise.py). What is wrong with it costs a ModelError that names the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from baton.errors import ModelError
from engine.quantization import packing
from engine.quantization.groupwise import Fp8Quantized, GroupQuantized
from engine.quantization.reader import Files, Reader
from engine.quantization.scheme import Form, Layout, Scheme
from engine.quantization.window import Window

_QUANTIZED = (torch.int8, torch.float8_e4m3fn)
_SUFFIXES = {
    Layout.GPTQ: ("qweight", "qzeros", "scales", "g_idx"),
    Layout.AWQ: ("qweight", "qzeros", "scales"),
    Layout.AWQ_GEMV: ("qweight", "qzeros", "scales"),
    Layout.PACKED: (
        *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    ),
    Layout.PLAIN: ("weight", "weight_scale", "weight_scale_inv", "weight_zero_point"),
}
SCALE_SUFFIXES = ("scales", "weight_scale", "weight_scale_inv", "input_scale")  # no weights
# Of activations and of KV, for which there is no use here.
_UNUSED = ("input_scale", "input_zero_point", "output_scale", "q_scale", "k_scale", "v_scale")


class QuantizedWeights:
    """The quantized weights of one checkpoint."""

    def __init__(self, files: Files, scheme: Scheme) -> None:
        self._files, self._scheme = files, scheme

    def __contains__(self, name: str) -> bool:
        """Whether weight `name` is stored quantized."""
        module = _module(name)
        names = self._files.names
        if module is None:
            return False
        if f"{module}.qweight" in names or f"{module}.weight_packed" in names:
            return True
        return name in names and self._files.dtype(name) in _QUANTIZED

    def parts(self, name: str) -> list[str]:
        """The tensors that weight `name` consists of."""
        module, form = self._form(name)
        stored = (f"{module}.{suffix}" for suffix in _SUFFIXES[form.layout])
        return [part for part in stored if part in self._files.names]

    def names(self, stored: Iterable[str]) -> Iterator[str]:
        """The weights and other tensors that a checkpoint with these tensors means."""
        parts = {suffix for suffixes in _SUFFIXES.values() for suffix in suffixes}
        for name in stored:
            module, _, kind = name.rpartition(".")
            weight = f"{module}.weight"
            if kind in ("qweight", "weight_packed"):
                yield weight
            elif kind == "weight" or not (kind in _UNUSED or (kind in parts and weight in self)):
                yield name

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of weight `name`, as its tensors have it; inputs that fill up a last word of
        GPTQ count where nothing says how many there are. Raises ModelError."""
        module, form = self._form(name)
        first = f"{module}.{_SUFFIXES[form.layout][0]}"
        if first not in self._files.names:
            raise ModelError(f"{self._files.path}: tensor {first!r} is missing")
        stored = self._files.read(first)
        if stored.ndim != 2:
            raise ModelError(f"{self._files.path}: tensor {first!r} is no matrix")
        per_word = packing.WORD // form.bits
        if form.layout is Layout.GPTQ:
            groups = f"{module}.g_idx"
            if groups in self._files.names:
                return stored.shape[1], self._files.read(groups).numel()
            return stored.shape[1], stored.shape[0] * per_word
        if form.layout is Layout.AWQ:
            return stored.shape[1] * per_word, stored.shape[0]
        if form.layout is Layout.PACKED:
            shape = f"{module}.weight_shape"
            if shape in self._files.names and self._files.read(shape).numel() == 2:
                out, into = (int(size) for size in self._files.read(shape))
                return out, into
        if form.layout in (Layout.PACKED, Layout.AWQ_GEMV):
            return stored.shape[0], stored.shape[1] * per_word
        return stored.shape[0], stored.shape[1]

    def dense(self, name: str, *shape: int, window: Window | None = None) -> Tensor:
        """Weight `name`, [out, in], or a window of it, as float32. Raises ModelError."""
        reader = self._reader(name, shape, window)
        return (reader.floats() if reader.form.floating else reader.integers()).dense()

    def quantized(
        self, name: str, out: int, into: int, window: Window | None = None
    ) -> GroupQuantized | Fp8Quantized | None:
        """The same in the form that products use; None if it has none (narrow blocks of fp8).
        Raises ModelError."""
        reader = self._reader(name, (out, into), window)
        return (reader.floats() if reader.form.floating else reader.integers()).grouped()

    def _reader(self, name: str, shape: tuple[int, ...], window: Window | None) -> Reader:
        module, form = self._form(name)
        if len(shape) != 2:
            raise ModelError(f"{self._files.path}: tensor {name!r} is quantized but no matrix")
        out, into = shape
        return Reader(self._files, module, form, out, into, window or Window.whole(out, into))

    def _form(self, name: str) -> tuple[str, Form]:
        module = _module(name) or name
        form = self._scheme.form(module)
        if form is None:
            raise ModelError(
                f"{self._files.path}: {module!r} is stored quantized, and quantization_config "
                "does not say how"
            )
        return module, form


def _module(name: str) -> str | None:
    return name.removesuffix(".weight") if name.endswith(".weight") else None
