"""Which code runs the model: asked for by name, and told of what was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.model.load import load_executor
from engine.model.runner import TorchExecutor


def load(path: Path, backend: str, *, dtype: str, **options: Any) -> TorchExecutor:
    """`load_executor` with a backend: `auto` takes the fastest there is, `torch` plain torch.

    `dtype` is that of the weights: int8 stands for int8 weights and bfloat16 everywhere else.
    """
    if dtype == "int8":
        options |= {"quantization": "int8"}
    return load_executor(path, dtype=_passes(dtype), attention_backend=backend, **options)


def backend_of(executor: TorchExecutor) -> str:
    """`compiled` or `torch`."""
    return "compiled" if type(executor.model).__module__.startswith("engine.native") else "torch"


def weights_of(executor: TorchExecutor, dtype: str) -> str:
    """The format of the weights of what was loaded as `dtype`, which may have been `auto`."""
    return dtype if dtype == "int8" else executor.pool.geometry.dtype


def _passes(dtype: str) -> str:
    return "bfloat16" if dtype == "int8" else dtype
