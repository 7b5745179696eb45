"""Reads a quantized weight, or a part of it, from the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from baton.errors import ModelError
from engine.quantization import packing
from engine.quantization.scheme import Form, Layout
from engine.quantization.stored import Floats, Integers
from engine.quantization.window import Window, span

_SCALES = (torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class Files:
    """Access to the tensors of a checkpoint as they are stored. What is read is best a view of the
    file: of a part of a weight, only that part is looked at."""

    path: Path
    names: Container[str]
    read: Callable[[str], Tensor]
    dtype: Callable[[str], torch.dtype | None]


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads a window of one weight [out, in]. Raises ModelError that names the tensor."""

    files: Files
    module: str
    form: Form
    out: int
    into: int
    window: Window

    def integers(self) -> Integers:
        """An integer weight, of any layout."""
        readers = {
            Layout.GPTQ: self._gptq,
            Layout.AWQ: self._awq,
            Layout.AWQ_GEMV: self._awq_gemv,
            Layout.PACKED: self._packed,
            Layout.PLAIN: self._plain,
        }
        return readers[self.form.layout]()

    def floats(self) -> Floats:
        """An fp8 weight."""
        values = self._tensor("weight", (torch.float8_e4m3fn,), (self.out, self.into))
        values = values[span(self.window.outputs), span(self.window.inputs)]
        inverse = f"{self.module}.weight_scale_inv" in self.files.names
        name = "weight_scale_inv" if inverse else "weight_scale"
        rows, columns = self.form.block or (1, self._group_size)
        if self.form.block is None and self.form.group_size is None:
            scales = self._scales(name)
        else:
            shape = (-(-self.out // rows), -(-self.into // columns))
            scales = self._tensor(name, _SCALES, shape)
        return Floats(
            values,
            scales,
            _indices(self.window.outputs) // rows,
            _indices(self.window.inputs) // columns,
        )

    def _gptq(self) -> Integers:
        bits, out, groups = self.form.bits, self.out, self._groups
        shape = (packing.words(self.into, bits), out)
        weights = self._tensor("qweight", (torch.int32,), shape)
        zeros = self._tensor("qzeros", (torch.int32,), (groups, packing.words(out, bits)))
        if self.form.zeros_less_one:
            # To whole words, as GPTQModel takes one away: what is borrowed comes back.
            zeros = zeros + (0x11111111 if bits == 4 else 0x01010101)
        scales = self._tensor("scales", _SCALES, (groups, out))
        return Integers(
            packing.unpack(self._outputs(weights.T), bits, self.window.inputs),
            self._outputs(scales.T).contiguous(),
            packing.unpack(zeros, bits, self.window.outputs).T.contiguous(),
            self._group_of("g_idx"),
            bits,
        )

    def _awq(self) -> Integers:
        bits, out, groups = self.form.bits, self.out, self._groups
        if out * bits % packing.WORD:
            raise self._error("qweight", f"cannot hold {out} outputs in whole words")
        width = packing.words(out, bits)
        weights = self._tensor("qweight", (torch.int32,), (self.into, width))
        zeros = self._tensor("qzeros", (torch.int32,), (groups, width))
        scales = self._tensor("scales", _SCALES, (groups, out))
        weights, outputs = weights[span(self.window.inputs)], self.window.outputs
        return Integers(
            packing.unpack_awq(weights, outputs).T.contiguous(),
            self._outputs(scales.T).contiguous(),
            packing.unpack_awq(zeros, outputs).T.contiguous(),
            self._group_of(None),
            bits,
        )

    def _awq_gemv(self) -> Integers:
        bits, out, groups = self.form.bits, self.out, range(self._groups)
        weights = self._tensor("qweight", (torch.int32,), (out, packing.words(self.into, bits)))
        # Zeros are filled up to whole words, or to several that a kernel loads at once.
        multiple = max(1, 128 // self._group_size)
        width = -(-packing.words(len(groups), bits) // multiple) * multiple
        zeros = self._tensor("qzeros", (torch.int32,), (out, width))
        scales = self._tensor("scales", _SCALES, (out, width * packing.WORD // bits))
        return Integers(
            packing.unpack(self._outputs(weights), bits, self.window.inputs),
            self._outputs(scales)[:, span(groups)].contiguous(),
            packing.unpack(self._outputs(zeros), bits, groups).contiguous(),
            self._group_of(None),
            bits,
        )

    def _packed(self) -> Integers:
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
            zeros = packing.unpack(words.T, bits, range(out)).T
        codes = packing.unpack(self._outputs(weights), bits, self.window.inputs)
        return self._integers(codes, scales, zeros)

    def _plain(self) -> Integers:
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
        codes = self._outputs(weights)[:, span(self.window.inputs)].view(torch.uint8) ^ 128
        return self._integers(codes, scales, zeros)

    def _integers(self, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Integers:
        """Those of compressed-tensors: codes of the window, scales and zeros [out, groups]."""
        return Integers(
            codes,
            self._outputs(scales).contiguous(),
            None if zeros is None else self._outputs(zeros).contiguous(),
            self._group_of("weight_g_idx"),
            self.form.bits,
        )

    def _outputs(self, found: Tensor) -> Tensor:
        """The window's rows."""
        return found[span(self.window.outputs)]

    @property
    def _group_size(self) -> int:
        if self.form.block is not None:
            return self.form.block[1]
        return self.form.group_size or self.into

    @property
    def _groups(self) -> int:
        return -(-self.into // self._group_size)

    def _group_of(self, suffix: str | None) -> Tensor:
        """The group of each of the window's inputs, [in] int64: as stored, else in their order."""
        ordered = _indices(self.window.inputs) // self._group_size
        if suffix is None or f"{self.module}.{suffix}" not in self.files.names:
            return ordered
        found = self._tensor(suffix, _INTEGERS, (self.into,)).long()
        if self.form.layout is not Layout.GPTQ and bool((found == -1).any()):
            return ordered  # how compressed-tensors leaves what it has not used
        if bool((found < 0).any()) or bool((found >= self._groups).any()):
            raise self._error(suffix, f"names groups that are not among {self._groups}")
        return found[span(self.window.inputs)]

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


def _indices(of: range) -> Tensor:
    return torch.arange(of.start, of.stop)
