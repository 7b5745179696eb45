"""Launches of matmul.py, at the widths of Llama-3-8B and odd ones."""

from __future__ import annotations

from functools import partial

import torch

from engine.gpu.kernels.matmul import matmul_fp8, matmul_int4, matmul_int8, quantize_rows

_HALF = torch.bfloat16


def _int4(
    tokens: int,
    group: int = 128,
    *,
    out: int = 4096,
    into: int = 4096,
    zeros: bool = False,
    dtype: torch.dtype = _HALF,
) -> None:
    x = torch.empty(tokens, into, dtype=dtype, device="meta")
    words = torch.empty(out, -(-into // 128) * 16, dtype=torch.int32, device="meta")
    scales = torch.empty(out, into // group, dtype=_HALF, device="meta")
    offsets = torch.empty_like(scales, dtype=torch.uint8) if zeros else None
    matmul_int4(x, words, scales, offsets, group, x.new_empty(out))


def _int8(tokens: int, group: int = 4096, zeros: bool = False) -> None:
    x = torch.empty(tokens, 4096, dtype=_HALF, device="meta")
    values = torch.empty(6144, 4096, dtype=torch.int8, device="meta")
    scales = torch.empty(6144, 4096 // group, dtype=_HALF, device="meta")
    offsets = torch.empty_like(scales, dtype=torch.uint8) if zeros else None
    matmul_int8(x, values, scales, offsets)


def _fp8(tokens: int, groups: int = 1) -> None:
    x = torch.empty(tokens, 4096, dtype=_HALF, device="meta")
    values = torch.empty(4096, 4096, dtype=torch.float8_e4m3fn, device="meta")
    matmul_fp8(x, values, torch.empty(4096, groups, device="meta"))


LAUNCHES = {
    "int4-1": partial(_int4, 1),
    "int4-1-groups-of-32-zeros": partial(_int4, 1, 32, zeros=True),
    "int4-1-wide": partial(_int4, 1, out=28672),
    "int4-1-one-group": partial(_int4, 1, 1000, into=1000),
    "int4-8": partial(_int4, 8),
    "int4-8-groups-of-64-zeros": partial(_int4, 8, 64, zeros=True),
    "int4-64": partial(_int4, 64),
    "int4-2048": partial(_int4, 2048),
    "int4-2048-float16": partial(_int4, 2048, dtype=torch.float16),
    "int4-2048-float32": partial(_int4, 2048, dtype=torch.float32),
    "int8-1": partial(_int8, 1),
    "int8-1-groups-zeros": partial(_int8, 1, 128, True),
    "int8-8": partial(_int8, 8),
    "int8-64-groups": partial(_int8, 64, 128),
    "int8-2048": partial(_int8, 2048),
    "fp8-1": partial(_fp8, 1),
    "fp8-1-groups": partial(_fp8, 1, 32),
    "fp8-16": partial(_fp8, 16),
    "fp8-64-groups": partial(_fp8, 64, 32),
    "fp8-2048": partial(_fp8, 2048),
}
SINCE_SM90 = {
    "rows": lambda: quantize_rows(torch.empty(5, 4096, dtype=_HALF, device="meta")),
}
