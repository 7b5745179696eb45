"""What the tensors of a quantized weight say once they are unpacked: numbers, and which scale each
one has."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.quantization.groupwise import Fp8Quantized, GroupQuantized, pack, row_slices
from engine.quantization.window import span

_RUN = 16  # inputs of one group that products want next to each other
_SPAN = 128  # groups that are no powers of two are multiples of it, for four bits


@dataclass(frozen=True, slots=True)
class Integers:
    """Weights (code - zero) * scale, the groups of inputs as they come."""

    codes: Tensor  # [out, in] uint8
    scales: Tensor  # [out, groups]
    zeros: Tensor | None  # [out, groups] uint8; None for the middle of the codes
    group_of: Tensor  # [in] int64; not every group need have inputs
    bits: int

    def dense(self) -> Tensor:
        """[out, in] float32."""
        out, into = self.codes.shape
        dense = torch.empty((out, into))
        for rows in row_slices(out, into):
            scales = self.scales[rows].float().index_select(1, self.group_of)
            if self.zeros is None:
                zeros: Tensor | int = 2 ** (self.bits - 1)
            else:
                zeros = self.zeros[rows].float().index_select(1, self.group_of)
            dense[rows] = (self.codes[rows].float() - zeros) * scales
        return dense

    def grouped(self) -> GroupQuantized:
        """The same with inputs sorted by group, in groups of one size.

        Groups that differ in size, because a part of a weight has them cut, become several smaller
        ones with the same scale. Where that would take groups of less than 16 inputs, each is
        filled up to a multiple of 16 with weights of zero.
        """
        codes, group_of, order = self.codes, self.group_of, None
        if bool((group_of.diff() < 0).any()):
            order = group_of.argsort(stable=True)
        into, size = len(group_of), _common_size(group_of if order is None else group_of[order])
        if size < _RUN and size < into:
            order, size = _filled(group_of), _RUN
        if order is not None:
            codes, group_of = codes.index_select(1, order), group_of[order]
        scales, zeros = _by_run(self.scales, group_of, size), None
        if self.zeros is not None and not bool((self.zeros == 2 ** (self.bits - 1)).all()):
            zeros = _by_run(self.zeros, group_of, size)
        if order is not None and len(order) > into:
            _clear(codes, order, zeros, 2 ** (self.bits - 1))
        shape = (len(codes), into)
        return GroupQuantized(pack(codes, self.bits), scales, zeros, self.bits, size, shape, order)


@dataclass(frozen=True, slots=True)
class Floats:
    """Weights in e4m3, times the scale of their block."""

    values: Tensor  # [out, in]
    scales: Tensor  # [blocks of outputs, blocks of inputs]
    row_of: Tensor  # [out] int64: the block of each output
    column_of: Tensor  # [in] int64: that of each input

    def dense(self) -> Tensor:
        """[out, in] float32."""
        dense = self.values.float()
        scales = self.scales.float().index_select(1, self.column_of)
        for rows in row_slices(*dense.shape):
            dense[rows] *= scales.index_select(0, self.row_of[rows])
        return dense

    def grouped(self) -> Fp8Quantized | None:
        """The same with a scale per output and group of inputs; None if blocks are cut into groups
        that no product takes."""
        size = _common_size(self.column_of)
        if size < min(_RUN, len(self.column_of)):
            return None
        scales = self.scales.float().index_select(0, self.row_of)
        return Fp8Quantized(self.values, _by_run(scales, self.column_of, size))


def narrowed(
    weight: GroupQuantized | Fp8Quantized, inputs: range
) -> GroupQuantized | Fp8Quantized | None:
    """Those inputs of a weight that has no order, on its device; None as `Floats.grouped`."""
    columns = torch.arange(inputs.start, inputs.stop, device=weight.scales.device)
    group_of = columns // (weight.shape[1] // weight.scales.shape[1])
    if isinstance(weight, Fp8Quantized):
        rows = torch.arange(weight.shape[0], device=columns.device)
        return Floats(weight.values[:, span(inputs)], weight.scales, rows, group_of).grouped()
    assert weight.order is None
    codes = weight.codes()[:, span(inputs)]
    return Integers(codes, weight.scales, weight.zeros, group_of, weight.bits).grouped()


def _common_size(group_of: Tensor) -> int:
    """The largest size of groups that divides all those of sorted inputs, and that products take:
    all inputs, a multiple of 128 or a power of two."""
    into = len(group_of)
    ends = (group_of.diff() != 0).nonzero().flatten() + 1
    size = math.gcd(into, *ends.tolist())
    return size if size == into or size % _SPAN == 0 else size & -size


def _filled(group_of: Tensor) -> Tensor:
    """Inputs sorted by group, those of each group filled up to a multiple of 16 by its last one."""
    order = group_of.argsort(stable=True)
    counts = torch.bincount(group_of)
    padded = -(-counts // _RUN) * _RUN
    within = torch.arange(int(padded.sum()), device=counts.device) - (
        padded.cumsum(0) - padded
    ).repeat_interleave(padded)
    last = (counts.cumsum(0) - 1).repeat_interleave(padded)
    return order[
        torch.minimum((counts.cumsum(0) - counts).repeat_interleave(padded) + within, last)
    ]


def _clear(codes: Tensor, order: Tensor, zeros: Tensor | None, middle: int) -> None:
    """Make a weight of zero of every column that repeats the input before it."""
    repeated = (order.diff(prepend=order.new_tensor([-1])) == 0).nonzero().flatten()
    codes[:, repeated] = middle if zeros is None else zeros[:, repeated // _RUN]


def _by_run(found: Tensor, group_of: Tensor, size: int) -> Tensor:
    """Of [out, groups] what each run of `size` sorted inputs has, [out, runs]."""
    return found.index_select(1, group_of[::size])
