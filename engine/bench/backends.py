"""Which code runs the model: asked for by name, and told of what was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.load import load_executor
from engine.model.runner import TorchExecutor

QUANTIZED = ("int8", "int4")  # formats of weights alone, of which plain torch has none


def load(path: Path, backend: str, *, dtype: str, **options: Any) -> TorchExecutor:
    """`load_executor` with a backend: `auto` takes the fastest there is, `torch` plain torch.

    `dtype` is that of the weights: int8 and int4 stand for such weights and bfloat16 elsewhere.
    """
    if dtype in QUANTIZED:
        options |= {"quantization": dtype}
    return load_executor(path, dtype=_passes(dtype), attention_backend=backend, **options)


def backend_of(executor: TorchExecutor) -> str:
    """`compiled` or `torch`."""
    return "compiled" if type(executor.model).__module__.startswith("engine.native") else "torch"


def weights_of(executor: TorchExecutor, dtype: str) -> str:
    """The format of the weights of what was loaded as `dtype`, which may have been `auto`."""
    return dtype if dtype in QUANTIZED else executor.pool.geometry.dtype


def _passes(dtype: str) -> str:
    return "bfloat16" if dtype in QUANTIZED else dtype
