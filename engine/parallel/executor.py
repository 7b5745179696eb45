"""Runs plans on several ranks."""

from __future__ import annotations

from typing import Any

from engine.model.runner import TorchExecutor
from engine.parallel.model import ParallelModel


class ParallelExecutor(TorchExecutor):
    """An Executor (engine/executor.py) over a model that has been started."""

    def __init__(self, model: ParallelModel, *arguments: Any, **options: Any) -> None:
        """As TorchExecutor. Ends the ranks when it is closed."""
        super().__init__(model, *arguments, **options)
        self._parallel = model

    def close(self) -> None:
        """End the ranks, and the threads that swap. Idempotent."""
        super().close()
        self._parallel.close()
