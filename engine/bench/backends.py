"""Which code runs the model: asked for by name, and told of what was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.model.load import load_executor
from engine.model.runner import TorchExecutor


def load(path: Path, backend: str, **options: Any) -> TorchExecutor:
    """`load_executor` with a backend: `auto` takes the best there is, `torch` plain torch."""
    del backend  # there is only one as yet
    return load_executor(path, **options)


def backend_of(executor: TorchExecutor) -> str:
    """`compiled` or `torch`."""
    return "compiled" if type(executor.model).__module__.startswith("engine.native") else "torch"


def weights_of(executor: TorchExecutor) -> str:
    """The format of its matrices."""
    return executor.pool.geometry.dtype
