"""How long a pass takes: seconds = base + per_token * tokens + per_context * context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scheduling.plan import StepPlan


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A pass that ran. `context` is the number of KV positions read, over all its chunks."""

    tokens: int
    context: int
    seconds: float

    @classmethod
    def of(cls, plan: StepPlan, seconds: float) -> StepRecord:
        """The record of a plan that took `seconds`."""
        return cls(plan.tokens, context_of(plan), seconds)


@dataclass(frozen=True, slots=True)
class LinearCost:
    """The model; all coefficients in seconds, none negative."""

    base: float = 0.005
    per_token: float = 0.0005
    per_context: float = 0.0

    def seconds(self, tokens: int, context: int = 0) -> float:
        """Predicted time of a pass."""
        return self.base + self.per_token * tokens + self.per_context * context

    def of(self, plan: StepPlan) -> float:
        """Predicted time of a plan."""
        return self.seconds(plan.tokens, context_of(plan))

    @classmethod
    def fit(cls, steps: Sequence[StepRecord]) -> LinearCost:
        """Least squares over recorded passes. A term that would come out negative is left out,
        as no pass gets faster with more work. Raises ValueError without steps."""
        if not steps:
            raise ValueError("no steps to fit a cost model to")
        terms = np.array([(1.0, step.tokens, step.context) for step in steps])  # [steps, 3]
        seconds = np.array([step.seconds for step in steps])
        scale = np.maximum(terms.max(axis=0), 1.0)
        used = [0, 1, 2]
        coefficients = np.zeros(3)
        while used:
            found = np.linalg.lstsq(terms[:, used] / scale[used], seconds, rcond=None)[0]
            if (found >= 0).all():
                coefficients[used] = found / scale[used]
                break
            del used[int(found.argmin())]
        base, per_token, per_context = coefficients.tolist()
        return cls(base, per_token, per_context)


def context_of(plan: StepPlan) -> int:
    """KV positions that the pass reads: each chunk attends to all that is before its end."""
    return sum(chunk.start + chunk.length for chunk in plan.chunks)
