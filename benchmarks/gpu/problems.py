"""What tile sizes are measured for: the kernels at the widths of models that the benchmark has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from benchmarks.gpu import attention, kernels
from benchmarks.gpu.kernels import LLAMA_8B, QWEN_06B, Case

Calls = dict[str, Callable[[], Any]]

_WIDTHS = {"llama-3-8b": LLAMA_8B, "qwen3-0.6b": QWEN_06B}
_ATTENTION = ("decode, 8 x 8192", "prompt, 4096 after 0", "prompt, 512 after 4096")


def lots(device: torch.device) -> Iterator[Calls]:
    """Calls by name, in lots, those that count most first."""
    for model, widths in _WIDTHS.items():
        for tokens in kernels.PRODUCTS[:-1]:  # a kind of tile each; the last has that before it
            yield _named(f"products, {model}", kernels.every_product(device, tokens, widths))
        shape = attention.SHAPES[model]
        yield _attention(model, shape, "bfloat16", device)
        rows = [*kernels.rows(device, 8192, widths), *kernels.choices(device, 64, widths)]
        yield _named(f"rows, {model}", rows)
    yield _named("blocks", kernels.blocks(device, 1024))
    for model in _WIDTHS:
        for form in attention.KV:
            yield _attention(model, attention.SHAPES[model], form, device)


def _attention(model: str, shape: attention.Shape, form: str, device: torch.device) -> Calls:
    cases = attention.cases(shape, attention.KV[form], device)
    return {
        f"attention, {model}, {form}, {case.name}": case.call
        for case in cases
        if case.name in _ATTENTION
    }


def _named(kind: str, cases: Iterable[Case]) -> Calls:
    return {f"{kind}, {case.name} x {case.tokens}": case.call for case in cases}
