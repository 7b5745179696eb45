"""Quantized weights of a checkpoint: what its tensors mean.

A weight `a.b.weight` that the configuration of a model asks for may be stored under other names
and in another layout. Here it is read, checked, and given as dense floats or in the form that
products use (groupwise.py). What is wrong with it costs a ModelError that names the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from baton.errors import ModelError
from engine.quantization import packing
from engine.quantization.groupwise import Fp8Quantized, GroupQuantized, pack
from engine.quantization.scheme import Form, Layout, Scheme

_SCALES = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int32, torch.int64)
_QUANTIZED = (torch.int8, torch.float8_e4m3fn)
_SUFFIXES = {
    Layout.GPTQ: ("qweight", "qzeros", "scales", "g_idx"),
    Layout.AWQ: ("qweight", "qzeros", "scales"),
    Layout.PACKED: (
        *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    ),
    Layout.PLAIN: ("weight", "weight_scale", "weight_scale_inv", "weight_zero_point"),
}
SCALE_SUFFIXES = ("scales", "weight_scale", "weight_scale_inv", "input_scale")  # no weights
_SLICE = 2**24  # weights that are worked on at once


@dataclass(frozen=True, slots=True)
class Files:
    """Access to the tensors of a checkpoint as they are stored."""

    path: Path
    names: Container[str]
    read: Callable[[str], Tensor]
    dtype: Callable[[str], torch.dtype | None]


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

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of weight `name`, as its tensors have it; inputs that fill up a last word of
        GPTQ count. Raises ModelError."""
        module, form = self._form(name)
        first = f"{module}.{_SUFFIXES[form.layout][0]}"
        if first not in self._files.names:
            raise ModelError(f"{self._files.path}: tensor {first!r} is missing")
        stored = self._files.read(first)
        if stored.ndim != 2:
            raise ModelError(f"{self._files.path}: tensor {first!r} is no matrix")
        per_word = packing.WORD // form.bits
        if form.layout is Layout.GPTQ:
            return stored.shape[1], stored.shape[0] * per_word
        if form.layout is Layout.AWQ:
            return stored.shape[1] * per_word, stored.shape[0]
        if form.layout is Layout.PACKED:
            shape = f"{module}.weight_shape"
            if shape in self._files.names and self._files.read(shape).numel() == 2:
                out, into = (int(size) for size in self._files.read(shape))
                return out, into
            return stored.shape[0], stored.shape[1] * per_word
        return stored.shape[0], stored.shape[1]

    def dense(self, name: str, *shape: int) -> Tensor:
        """Weight `name`, [out, in], as float32. Raises ModelError."""
        reader = self._reader(name, shape)
        return reader.fp8().dense() if reader.form.floating else reader.integers().dense()

    def quantized(self, name: str, out: int, into: int) -> GroupQuantized | Fp8Quantized | None:
        """Weight `name` in the form that products use; None if it has none (blocks of fp8, groups
        of unequal sizes). Raises ModelError."""
        reader = self._reader(name, (out, into))
        return reader.fp8().by_output() if reader.form.floating else reader.integers().grouped()

    def _reader(self, name: str, shape: tuple[int, ...]) -> _Reader:
        module, form = self._form(name)
        if len(shape) != 2:
            raise ModelError(f"{self._files.path}: tensor {name!r} is quantized but no matrix")
        return _Reader(self._files, module, form, shape[0], shape[1])

    def _form(self, name: str) -> tuple[str, Form]:
        module = _module(name) or name
        form = self._scheme.form(module)
        if form is None:
            raise ModelError(
                f"{self._files.path}: {module!r} is stored quantized, and quantization_config "
                "does not say how"
            )
        return module, form


@dataclass(frozen=True, slots=True)
class _Integers:
    """Weights (code - zero) * scale, the groups of inputs as they come."""

    codes: Tensor  # [out, in] uint8
    scales: Tensor  # [out, groups]
    zeros: Tensor | None  # [out, groups] uint8; None for the middle of the codes
    group_of: Tensor  # [in] int64
    bits: int

    def dense(self) -> Tensor:
        """[out, in] float32."""
        out, into = self.codes.shape
        dense = torch.empty((out, into))
        step = max(1, _SLICE // into)
        for first in range(0, out, step):
            rows = slice(first, first + step)
            scales = self.scales[rows].float().index_select(1, self.group_of)
            if self.zeros is None:
                zeros: Tensor | int = 2 ** (self.bits - 1)
            else:
                zeros = self.zeros[rows].float().index_select(1, self.group_of)
            dense[rows] = (self.codes[rows].float() - zeros) * scales
        return dense

    def grouped(self) -> GroupQuantized | None:
        """The same with inputs sorted by group; None if groups are of several sizes."""
        (out, into), groups = self.codes.shape, self.scales.shape[1]
        sizes = torch.bincount(self.group_of, minlength=groups)
        if not bool((sizes * groups == into).all()):
            return None
        codes, order = self.codes, None
        if bool((self.group_of.diff() < 0).any()):
            order = self.group_of.argsort(stable=True)
            codes = codes.index_select(1, order)
        zeros = self.zeros
        if zeros is not None and bool((zeros == 2 ** (self.bits - 1)).all()):
            zeros = None
        return GroupQuantized(
            pack(codes, self.bits),
            self.scales,
            zeros,
            self.bits,
            into // groups,
            (out, into),
            order,
        )


@dataclass(frozen=True, slots=True)
class _Fp8:
    """Weights in e4m3, times the scale of their block."""

    values: Tensor  # [out, in]
    scales: Tensor  # [block rows, block columns]
    block: tuple[int, int]

    def dense(self) -> Tensor:
        """[out, in] float32."""
        out, into = self.values.shape
        rows, columns = self.block
        scales = self.scales.float().repeat_interleave(columns, 1)[:, :into]
        dense = self.values.float()
        for index, first in enumerate(range(0, out, rows)):
            dense[first : first + rows] *= scales[index]
        return dense

    def by_output(self) -> Fp8Quantized | None:
        """The same with a scale per output; None if scales change along the inputs."""
        if self.scales.shape[1] != 1:
            return None
        scales = self.scales[:, 0].float().repeat_interleave(self.block[0])
        return Fp8Quantized(self.values, scales[: len(self.values)])


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one weight."""

    files: Files
    module: str
    form: Form
    out: int
    into: int

    def integers(self) -> _Integers:
        """An integer weight, of any layout."""
        readers = {
            Layout.GPTQ: self._gptq,
            Layout.AWQ: self._awq,
            Layout.PACKED: self._packed,
            Layout.PLAIN: self._plain,
        }
        return readers[self.form.layout]()

    def fp8(self) -> _Fp8:
        """An fp8 weight."""
        values = self._tensor("weight", (torch.float8_e4m3fn,), (self.out, self.into))
        inverse = f"{self.module}.weight_scale_inv" in self.files.names
        name = "weight_scale_inv" if inverse else "weight_scale"
        if self.form.block is None and self.form.group_size is None:
            return _Fp8(values, self._scales(name), (1, self.into))
        rows, columns = self.form.block or (1, self._group_size)
        shape = (-(-self.out // rows), -(-self.into // columns))
        return _Fp8(values, self._tensor(name, _SCALES, shape), (rows, columns))

    def _gptq(self) -> _Integers:
        bits, out, groups = self.form.bits, self.out, self._groups
        shape = (packing.words(self.into, bits), out)
        weights = self._tensor("qweight", (torch.int32,), shape)
        zeros = self._tensor("qzeros", (torch.int32,), (groups, packing.words(out, bits)))
        if self.form.zeros_less_one:
            # To whole words, as GPTQModel takes one away: what is borrowed comes back.
            zeros = zeros + (0x11111111 if bits == 4 else 0x01010101)
        return _Integers(
            packing.unpack(weights.T, bits, self.into),
            self._tensor("scales", _SCALES, (groups, out)).T.contiguous(),
            packing.unpack(zeros, bits, out).T.contiguous(),
            self._group_of("g_idx"),
            bits,
        )

    def _awq(self) -> _Integers:
        bits, out, groups = self.form.bits, self.out, self._groups
        if out * bits % packing.WORD:
            raise self._error("qweight", f"cannot hold {out} outputs in whole words")
        width = packing.words(out, bits)
        weights = self._tensor("qweight", (torch.int32,), (self.into, width))
        zeros = self._tensor("qzeros", (torch.int32,), (groups, width))
        return _Integers(
            packing.from_awq(packing.unpack(weights, bits, out)).T.contiguous(),
            self._tensor("scales", _SCALES, (groups, out)).T.contiguous(),
            packing.from_awq(packing.unpack(zeros, bits, out)).T.contiguous(),
            self._group_of(None),
            bits,
        )

    def _packed(self) -> _Integers:
        bits, out, groups = self.form.bits, self.out, self._groups
        shape = (out, packing.words(self.into, bits))
        weights = self._tensor("weight_packed", (torch.int32,), shape)
        if f"{self.module}.weight_shape" in self.files.names:
            stored = self._tensor("weight_shape", _INTEGERS, (2,)).tolist()
            if stored != [out, self.into]:
                raise self._error("weight_shape", f"says {stored}, not {[out, self.into]}")
        scales, zeros = self._scales("weight_scale"), None
        if not self.form.symmetric and self._has(torch.int8, "weight_zero_point"):
            zeros = self._signed_zeros(tuple(scales.shape))
        elif not self.form.symmetric:
            width = (packing.words(out, bits), groups)
            words = self._tensor("weight_zero_point", (torch.int32,), width)
            zeros = packing.unpack(words.T, bits, out).T.contiguous()
        codes = packing.unpack(weights, bits, self.into)
        return _Integers(codes, scales, zeros, self._group_of("weight_g_idx"), bits)

    def _plain(self) -> _Integers:
        weights = self._tensor("weight", (torch.int8,), (self.out, self.into))
        rows, _ = self.form.block or (1, 0)
        if self.form.block is not None:
            scales = self._tensor("weight_scale", _SCALES, (-(-self.out // rows), self._groups))
            scales = scales.repeat_interleave(rows, 0)[: self.out]
        else:
            scales = self._scales("weight_scale")
        zeros = None
        if not self.form.symmetric:
            zeros = self._signed_zeros(tuple(scales.shape))
        codes = weights.view(torch.uint8) ^ 128
        return _Integers(codes, scales, zeros, self._group_of("weight_g_idx"), 8)

    @property
    def _group_size(self) -> int:
        if self.form.block is not None:
            return self.form.block[1]
        return self.form.group_size or self.into

    @property
    def _groups(self) -> int:
        return -(-self.into // self._group_size)

    def _group_of(self, suffix: str | None) -> Tensor:
        """The group of each input, [in] int64: as stored, else in their order."""
        if suffix is None or f"{self.module}.{suffix}" not in self.files.names:
            return torch.arange(self.into) // self._group_size
        found = self._tensor(suffix, _INTEGERS, (self.into,)).long()
        if bool((found < 0).any()) or bool((found >= self._groups).any()):
            raise self._error(suffix, f"names groups that are not among {self._groups}")
        return found

    def _scales(self, suffix: str) -> Tensor:
        """[out, groups]; one scale for all is spread over the outputs."""
        found = self._tensor(suffix, _SCALES, None)
        whole = self.form.group_size is None
        if whole and found.numel() == 1:
            return found.reshape(1, 1).expand(self.out, 1)
        if whole and tuple(found.shape) == (self.out,):
            return found[:, None]
        return self._shaped(suffix, found, (self.out, self._groups))

    def _signed_zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Zeros that were not packed, in the order of the codes, [out, groups] uint8."""
        found = self._tensor("weight_zero_point", (torch.int8,), None)
        if found.numel() == 1:
            found = found.reshape(1, 1).expand(*shape)
        elif found.ndim == 1:
            found = found[:, None]
        found = self._shaped("weight_zero_point", found, shape)
        zeros: Tensor = found.to(torch.int16) + 2 ** (self.form.bits - 1)
        return zeros.to(torch.uint8)

    def _has(self, dtype: torch.dtype, suffix: str) -> bool:
        name = f"{self.module}.{suffix}"
        return name in self.files.names and self.files.dtype(name) is dtype

    def _tensor(
        self, suffix: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None
    ) -> Tensor:
        """A tensor of the weight, of one of those dtypes; of any shape if None."""
        name = f"{self.module}.{suffix}"
        if name not in self.files.names:
            raise ModelError(f"{self.files.path}: tensor {name!r} is missing")
        found = self.files.read(name)
        if found.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise self._error(suffix, f"holds {found.dtype}, not {wanted}")
        return found if shape is None else self._shaped(suffix, found, shape)

    def _shaped(self, suffix: str, found: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(found.shape) != shape:
            raise self._error(
                suffix, f"has shape {tuple(found.shape)}, the configuration asks for {shape}"
            )
        return found

    def _error(self, suffix: str, reason: str) -> ModelError:
        return ModelError(f"{self.files.path}: tensor '{self.module}.{suffix}' {reason}")


def _module(name: str) -> str | None:
    return name.removesuffix(".weight") if name.endswith(".weight") else None
