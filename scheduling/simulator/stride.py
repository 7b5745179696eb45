"""Many generation passes of the same sequences at once: how long they take, in closed form.

In each of them every sequence reads one token of context more, so pass i (from 0) takes
`first + i * growth` seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from scheduling.cost import LinearCost
from scheduling.plan import StepPlan


@dataclass(frozen=True, slots=True)
class Stride:
    """The seconds of passes that follow each other."""

    first: float
    growth: float

    @classmethod
    def of(cls, plan: StepPlan, seconds: float, cost: LinearCost) -> Stride:
        """Passes like `plan`, the first of which takes `seconds`."""
        return cls(seconds, cost.per_context * len(plan.chunks))

    def seconds(self, passes: int) -> float:
        """Of so many passes together."""
        return passes * self.first + self.growth * passes * (passes - 1) / 2

    def last(self, passes: int) -> float:
        """Of the last of so many passes."""
        return self.first + (passes - 1) * self.growth

    def begun_by(self, seconds: float) -> int:
        """How many passes have begun before `seconds` have passed; at least 1. One that would
        begin at that very moment has not."""
        half = self.first - self.growth / 2
        if self.growth:
            root = math.sqrt(half * half + 2 * self.growth * max(seconds, 0.0))
            passes = math.ceil((root - half) / self.growth)
        else:
            passes = math.ceil(seconds / self.first)
        passes = max(1, passes)
        while passes > 1 and self.seconds(passes - 1) >= seconds:
            passes -= 1
        while self.seconds(passes) < seconds:
            passes += 1
        return passes

    def ends(self, begins: float, passes: int) -> list[float]:
        """When each of so many passes ends."""
        count = np.arange(1, passes + 1)
        times = begins + count * self.first + self.growth * count * (count - 1) / 2
        return [float(time) for time in times]
