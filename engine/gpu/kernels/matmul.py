"""Products with weights in int8, int4 and fp8: x [T, in] by [out, in], giving [T, out].

One token is a walk over the weights, bound by memory; two and more are tiles of `tl.dot`. Where
either has too few programs for the device, its inputs are split among several, whose sums a second
kernel adds in their order: no atomics, and the same result every time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from engine.gpu.kernels import matmul_tiles as tiles
from engine.gpu.kernels.launch import tuned

SPAN, LANES = tiles.SPAN, tiles.LANES
SKINNY = 16  # tokens up to which a product is bound by its weights
_PARTS_OF_SPAN = (16, 32, 64)
_MOST_SPLITS = 8
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class _Product:
    """One product: its tensors, and what all kernels are told of them."""

    x: Tensor
    weights: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    out: Tensor

    def launch(self, vector: Any, tiled: Any, steps: int, step: str, **constants: Any) -> None:
        """Run the kernel for so many tokens. `steps` counts what splits share, spans or inputs,
        of which a program takes `constants[step]` at a time."""
        tokens, outputs = self.out.shape
        rows = -(-outputs // constants["BLOCK_N"])
        columns = 1 if tokens == 1 else -(-tokens // constants["BLOCK_M"])
        share, splits = _shares(rows * columns, steps, constants[step], self.x.device)
        out = self.out
        if splits > 1:
            out = torch.empty((splits, tokens, outputs), dtype=torch.float32, device=out.device)
        tensors = (
            self.x,
            self.weights,
            self.scales,
            self.scales if self.zeros is None else self.zeros,
            self.x if self.bias is None else self.bias,
            out,
        )
        sizes = [outputs, self.x.shape[1], *([steps] if step == "BLOCK_S" else [])]
        sizes.append(self.scales.shape[1])
        flags = {
            "ZEROS": self.zeros is not None,
            "BIAS": self.bias is not None,
            "SPLIT": splits > 1,
        }
        if tokens == 1:
            vector[rows, splits](*tensors, *sizes, share, **flags, **constants)
        else:
            sizes.append(self.x.stride(0))
            tiled[columns, rows, splits](*tensors, tokens, *sizes, share, **flags, **constants)
        if splits > 1:
            self._add(out)

    def _add(self, parts: Tensor) -> None:
        count, block = self.out.numel(), 1024
        tiles.add_splits[(-(-count // block),)](
            parts,
            self.x if self.bias is None else self.bias,
            self.out,
            count,
            self.out.shape[1],
            len(parts),
            BIAS=self.bias is not None,
            BLOCK=block,
        )


def pack_int4(codes: Tensor) -> Tensor:
    """Codes [out, in] uint8 as the words that `matmul_int4` reads, [out, spans * 16] int32.

    A span is 128 inputs, the last one filled up: nibble j of its word i is input 16 j + i.
    """
    out, into = codes.shape
    codes = torch.nn.functional.pad(codes, (0, -into % SPAN)).view(out, -1, SPAN // LANES, LANES)
    words = torch.zeros((out, codes.shape[1], LANES), dtype=torch.int32, device=codes.device)
    for plane in range(SPAN // LANES):
        words |= codes[:, :, plane].to(torch.int32) << 4 * plane
    return words.flatten(1)


def supports_int4(into: int, group_size: int) -> bool:
    """Whether `matmul_int4` takes groups of this size."""
    return group_size == into or group_size in _PARTS_OF_SPAN or group_size % SPAN == 0


def supports_int8(into: int, group_size: int) -> bool:
    """Whether `matmul_int8` takes groups of this size."""
    return group_size == into or group_size % 16 == 0


def supports_fp8(device: torch.device) -> bool:
    """Whether a device multiplies fp8 itself (sm_89 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def matmul_int4(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [T, in] times weights (code - zero) * scale, of four bits.

    words as `pack_int4` makes them, scales [out, groups] of any float, zeros the same in uint8 or
    None for 8, group_size as `supports_int4` has it, bias [out]. out [T, out], contiguous.
    """
    tokens, into = x.shape
    spans = -(-into // SPAN)
    assert words.shape == (len(scales), spans * LANES)
    assert supports_int4(into, group_size)
    product = _product(x, words, scales, zeros, bias, out)
    if tokens:
        group = 0 if scales.shape[1] == 1 else group_size
        product.launch(
            tiles.vector_int4,
            tiles.tiled_int4,
            spans,
            "BLOCK_S",
            GROUP=group,
            RUNS=SPAN // group if group in _PARTS_OF_SPAN else 1,
            **_int4_tiles(tokens, product),
        )
    return product.out


def matmul_int8(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [T, in] times weights (value - zero) * scale, of eight bits.

    values [out, in] int8, scales [out, groups] of any float; zeros the same in uint8, 128 of which
    is zero, or None. Groups are those that `supports_int8` has. bias [out], out [T, out],
    contiguous.
    """
    assert values.dtype is torch.int8
    return _bytes_product(x, values, scales, zeros, bias, out)


def matmul_fp8(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x [T, in] times weights value * scale, values [out, in] float8_e4m3fn, scales [out, groups]
    float32, of groups that `supports_int8` has.

    Where the device multiplies fp8, there is one group, and there are enough tokens to be bound by
    that, x is quantized too, each token by its largest number. Elsewhere weights are widened, which
    is more exact. bias [out], out [T, out], contiguous.
    """
    assert values.dtype is _FP8
    wide = x.dtype is torch.bfloat16 and len(x) > SKINNY and not (len(scales) | x.shape[1]) % 16
    if wide and scales.shape[1] == 1 and supports_fp8(x.device):
        numbers, rows = quantize_rows(x)
        found = torch._scaled_mm(
            numbers,
            values.t(),
            scale_a=rows[:, None],
            scale_b=scales.t(),
            bias=bias,
            out_dtype=x.dtype,
        )
        return found if out is None else out.copy_(found)
    return _bytes_product(x, values.view(torch.uint8), scales, None, bias, out)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, in] as float8_e4m3fn and scales [T] float32, each token by its largest number."""
    tokens, into = x.shape
    assert x.stride(1) == 1
    values = torch.empty((tokens, into), dtype=_FP8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    if tokens:
        block = min(triton.next_power_of_2(into), 4096)
        tiles.quantize_rows[(tokens,)](x, values, scales, into, x.stride(0), BLOCK=block)
    return values, scales


def _bytes_product(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    tokens, into = x.shape
    assert values.shape == (len(scales), into)
    groups = scales.shape[1]
    assert into % groups == 0
    assert supports_int8(into, into // groups)
    product = _product(x, values, scales, zeros, bias, out)
    if tokens:
        group = 0 if groups == 1 else into // groups
        product.launch(
            tiles.vector_int8,
            tiles.tiled_int8,
            into,
            "BLOCK_K",
            GROUP=group,
            FP8=values.dtype is torch.uint8,
            **_int8_tiles(tokens, group, product),
        )
    return product.out


def _product(
    x: Tensor,
    weights: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    out: Tensor | None,
) -> _Product:
    outputs = len(scales)
    assert x.stride(1) == 1
    assert weights.is_contiguous()
    assert scales.is_contiguous()
    if zeros is not None:
        assert zeros.shape == scales.shape
        assert zeros.is_contiguous()
    if bias is not None:
        assert bias.shape == (outputs,)
    if out is None:
        out = torch.empty((len(x), outputs), dtype=x.dtype, device=x.device)
    assert out.shape == (len(x), outputs)
    assert out.is_contiguous()
    return _Product(x, weights, scales, zeros, bias, out)


def _int4_tiles(tokens: int, product: _Product) -> dict[str, int]:
    """Tile sizes. A program of one token has 4 KiB of words in flight, two loads a thread."""
    default = {
        1: {"BLOCK_N": 16, "BLOCK_S": 4, "num_warps": 4},
        16: {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_S": 4, "num_warps": 4, "num_stages": 3},
        64: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_S": 2, "num_warps": 4, "num_stages": 3},
        128: {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_S": 2, "num_warps": 4, "num_stages": 2},
    }
    return _tuned("matmul_int4", tokens, product, default)


def _int8_tiles(tokens: int, group: int, product: _Product) -> dict[str, int]:
    """Tile sizes, with steps that stay in one group."""
    default = {
        1: {"BLOCK_N": 8, "BLOCK_K": 512, "num_warps": 4},
        16: {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
        64: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
        128: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    }
    found = _tuned("matmul_int8", tokens, product, default)
    if group:
        found = found | {"BLOCK_K": min(found["BLOCK_K"], group & -group)}
    return found


def _tuned(
    kernel: str, tokens: int, product: _Product, default: dict[int, dict[str, int]]
) -> dict[str, int]:
    kind = next((most for most in default if tokens <= most), max(default))
    key = f"{kind}x{len(product.scales)}x{product.x.shape[1]}"
    found = tuned(kernel, key, default[kind], product.x.device)
    if product.x.dtype is torch.float32 and kind > SKINNY:  # twice the bytes in shared memory
        found = found | {"num_stages": 2, "BLOCK_M": 32, "BLOCK_N": 64}
    return found


def _shares(programs: int, steps: int, step: int, device: torch.device) -> tuple[int, int]:
    """How many steps a split takes, and how many splits there are: enough programs for two on
    each multiprocessor, as far as there are steps."""
    wanted = min(-(-2 * _multiprocessors(device) // programs), -(-steps // step), _MOST_SPLITS)
    share = -(-steps // max(wanted, 1) // step) * step if wanted > 1 else steps
    share = max(share, step)
    return share, -(-steps // share)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Those of an H100, where the device is not there to be asked."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
