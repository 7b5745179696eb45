"""Weights as integers that share a scale by groups of inputs, and weights in fp8.

An integer weight is (code - zero) * scale, with codes of 4 or 8 unsigned bits, and a scale and a
zero for each output and each group of consecutive inputs. Symmetric weights have no zeros: theirs
is the middle, 8 or 128. An fp8 weight is an e4m3 number times the scale of its output and group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_FP8 = torch.float8_e4m3fn
_LARGEST_FP8 = torch.finfo(_FP8).max  # 448
# By how many levels the largest weight of a group is tried beside the outermost one: a smaller
# scale clips it and has the others finer.
_TRIED = {4: tuple(0.1 * step for step in range(-6, 13)), 8: (-1.0, -0.5, 0.0, 0.5)}
_SLICE = 2**24  # weights that are worked on at once


@dataclass(frozen=True, slots=True, eq=False)
class GroupQuantized:
    """Weights [out, in] as integers.

    `order`, if any, sorts inputs by group (GPTQ's act-order): column i belongs to input order[i].
    Of columns of the same input, which fill up a group, one has its weights and the others are 0.
    """

    packed: Tensor  # 8 bits: [out, columns] int8, codes - 128
    # 4 bits: [out, ceil(columns/2)] uint8, low half first
    scales: Tensor  # [out, groups], any float
    zeros: Tensor | None  # [out, groups] uint8
    bits: int
    group_size: int  # a divisor of the columns
    shape: tuple[int, int]
    order: Tensor | None = None  # [columns] int64

    @property
    def columns(self) -> int:
        """As many as there are inputs, and those that fill up groups."""
        return self.shape[1] if self.order is None else len(self.order)

    def to(self, device: torch.device | str) -> GroupQuantized:
        """The same on a device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        order = None if self.order is None else self.order.to(device)
        packed, scales = self.packed.to(device), self.scales.to(device)
        return replace(self, packed=packed, scales=scales, zeros=zeros, order=order)

    def codes(self) -> Tensor:
        """[out, columns] uint8."""
        if self.bits == 8:
            return self.packed.view(torch.uint8) ^ 128
        pairs = torch.stack((self.packed & 15, self.packed >> 4), -1)
        return pairs.flatten(1)[:, : self.columns]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in], computed in float32."""
        out, columns = self.shape[0], self.columns
        dense = torch.empty((out, columns), dtype=dtype, device=self.packed.device)
        codes = self.codes()
        for rows in row_slices(out, columns):
            zeros = (
                2 ** (self.bits - 1) if self.zeros is None else self.zeros[rows, :, None].float()
            )
            groups = codes[rows].view(-1, self.scales.shape[1], self.group_size)
            found = (groups.float() - zeros) * self.scales[rows, :, None].float()
            dense[rows] = found.view(-1, columns)
        if self.order is None:
            return dense
        return dense.new_zeros(self.shape).index_add_(1, self.order, dense)


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Quantized:
    """Weights [out, in] in fp8."""

    values: Tensor  # [out, in] float8_e4m3fn
    scales: Tensor  # [out, groups] float32, of groups of one size

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape[0], self.values.shape[1]

    def to(self, device: torch.device | str) -> Fp8Quantized:
        """The same on a device."""
        return Fp8Quantized(self.values.to(device), self.scales.to(device))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [out, in], computed in float32."""
        groups = self.values.float().view(len(self.values), self.scales.shape[1], -1)
        return (groups * self.scales[:, :, None]).to(dtype).view(self.shape)


def quantize(weight: Tensor, bits: int, group_size: int) -> GroupQuantized:
    """`weight` [out, in], symmetric, with the scales of least squared error that a search finds.

    bits 4 or 8; group_size divides in, which is one scale per output. Scales are bfloat16.
    """
    out, into = weight.shape
    assert bits in _TRIED and into % group_size == 0, (bits, into, group_size)
    groups = into // group_size
    codes = torch.empty((out, into), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((out, groups), dtype=torch.bfloat16, device=weight.device)
    for rows in row_slices(out, into):
        found, scales[rows] = _search(weight[rows].float().view(-1, groups, group_size), bits)
        codes[rows] = found.view(-1, into)
    return GroupQuantized(pack(codes, bits), scales, None, bits, group_size, (out, into))


def quantize_fp8(weight: Tensor) -> Fp8Quantized:
    """`weight` [out, in], with the scales [out, 1] that make the largest of each output 448."""
    weight = weight.float()
    largest = weight.abs().amax(1, keepdim=True)
    scales = torch.where(largest > 0, largest / _LARGEST_FP8, 1.0)
    scaled = (weight / scales).clamp_(-_LARGEST_FP8, _LARGEST_FP8)
    return Fp8Quantized(scaled.to(_FP8), scales)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [out, in] uint8 as `GroupQuantized.packed`."""
    if bits == 8:
        return (codes ^ 128).view(torch.int8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, ::2] | codes[:, 1::2] << 4


def concatenated(parts: Sequence[GroupQuantized]) -> GroupQuantized | None:
    """Weights of the same inputs, one below the other; None if their formats differ."""
    first = parts[0]
    for part in parts[1:]:
        alike = (part.bits, part.group_size) == (first.bits, first.group_size)
        if not (alike and _same(part.order, first.order)):
            return None
    zeros = None
    if any(part.zeros is not None for part in parts):
        zeros = torch.cat([_zeros(part) for part in parts])
    scales = torch.cat([part.scales for part in parts])  # promotes where formats differ
    packed = torch.cat([part.packed for part in parts])
    shape = (len(packed), first.shape[1])
    return GroupQuantized(packed, scales, zeros, first.bits, first.group_size, shape, first.order)


def _search(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of weights [n, groups, size], and scales [n, groups] bfloat16.

    The largest weight goes to the outermost negative code, of which there is one more: scales may
    be negative. Each scale tried is fitted to its codes by least squares, rounded, and its codes
    are made anew before its error counts.
    """
    levels = 2 ** (bits - 1)
    extreme = weight.gather(-1, weight.abs().argmax(-1, keepdim=True))  # [n, groups, 1]
    best_codes, best_scale = torch.zeros_like(weight), torch.zeros_like(extreme)
    best_error = torch.full_like(extreme, torch.inf)
    for beside in _TRIED[bits]:
        scale = extreme / -(levels + beside)
        codes = _rounded(weight, scale, levels)
        fitted = (weight * codes).sum(-1, keepdim=True) / codes.square().sum(-1, keepdim=True)
        scale = torch.where(fitted.isfinite(), fitted, scale).bfloat16().float()
        codes = _rounded(weight, scale, levels)
        error = (weight - codes * scale).square_().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better, codes, best_codes)
    return (best_codes + levels).to(torch.uint8), best_scale.squeeze(-1).bfloat16()


def _rounded(weight: Tensor, scale: Tensor, levels: int) -> Tensor:
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    return (weight * inverse).round_().clamp_(-levels, levels - 1)


def _zeros(part: GroupQuantized) -> Tensor:
    if part.zeros is not None:
        return part.zeros
    return torch.full_like(part.scales, 2 ** (part.bits - 1), dtype=torch.uint8)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def row_slices(out: int, into: int) -> list[slice]:
    """Rows of a matrix that are worked on at once."""
    step = max(1, _SLICE // max(1, into))
    return [slice(first, first + step) for first in range(0, out, step)]
