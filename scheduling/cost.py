"""How long a pass takes, as a linear model of what is in it.

    seconds = base + per_token * prompt tokens + per_attention * attention of the prompt chunks
                   + per_sequence * generating sequences + per_context * KV positions they read

Prompt chunks are bound by arithmetic and generating sequences by memory, so they have terms of
their own (the form that DistServe's published profiles are fitted with).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import astuple, dataclass, replace

import numpy as np

from baton.types import Load
from scheduling.plan import StepPlan


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass does. `attention` is the sum over prompt chunks of length times end position,
    `context` the sum of the end positions of generating sequences."""

    prompt_tokens: int = 0
    attention: int = 0
    sequences: int = 0
    context: int = 0

    @classmethod
    def of(cls, plan: StepPlan) -> Work:
        """The work of a plan. A chunk of one token counts as generation."""
        prompt = attention = sequences = context = 0
        for _, start, length, _ in plan.chunks:
            if length == 1:
                sequences += 1
                context += start + 1
            else:
                prompt += length
                attention += length * (start + length)
        return cls(prompt, attention, sequences, context)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A pass that ran, and its wall time."""

    work: Work
    seconds: float

    @classmethod
    def of(cls, plan: StepPlan, seconds: float) -> StepRecord:
        """The record of a plan that took `seconds`."""
        return cls(Work.of(plan), seconds)


@dataclass(frozen=True, slots=True)
class LinearCost:
    """The model; all coefficients in seconds, none negative."""

    base: float = 0.005
    per_token: float = 0.0005
    per_attention: float = 0.0
    per_sequence: float = 0.0
    per_context: float = 0.0

    def seconds(self, work: Work) -> float:
        """Predicted time of a pass."""
        return (
            self.base
            + self.per_token * work.prompt_tokens
            + self.per_attention * work.attention
            + self.per_sequence * work.sequences
            + self.per_context * work.context
        )

    def of(self, plan: StepPlan) -> float:
        """Predicted time of a plan."""
        return self.seconds(Work.of(plan))

    def first_iteration(self, tokens: int) -> float:
        """Predicted time of a pass that computes `tokens` tokens of one prompt and nothing else:
        FastServe's t_init."""
        return self.base + self.per_token * tokens + self.per_attention * tokens * tokens

    @classmethod
    def fit(cls, steps: Collection[StepRecord]) -> LinearCost:
        """Least squares of the relative errors over recorded passes: what disturbs a pass costs
        a share of its time, and a step of generation is not to vanish beside a long prompt. A
        term that would come out negative is left out, as no pass gets faster with more work.
        Raises ValueError without steps."""
        if not steps:
            raise ValueError("no steps to fit a cost model to")
        terms = np.array([(1.0, *astuple(step.work)) for step in steps])  # [steps, 5]
        seconds = np.maximum([step.seconds for step in steps], 1e-9)
        terms /= seconds[:, None]
        scale = np.maximum(terms.max(axis=0), 1e-12)
        used = list(range(terms.shape[1]))
        coefficients, ones = np.zeros(terms.shape[1]), np.ones(len(terms))
        while used:
            found = np.linalg.lstsq(terms[:, used] / scale[used], ones, rcond=None)[0]
            if (found >= 0).all():
                coefficients[used] = found / scale[used]
                break
            del used[int(found.argmin())]
        return cls(*coefficients.tolist())


class CostTracker:
    """The cost model of one engine as it is measured: fitted again every `every` passes, over
    the last `window` of them. Deterministic: the same passes give the same model."""

    def __init__(
        self, initial: LinearCost | None = None, *, every: int = 64, window: int = 512
    ) -> None:
        """`every` 0 keeps the initial model for ever."""
        self.model = initial or LinearCost()
        self._every = every
        self._recent: deque[StepRecord] = deque(maxlen=window)
        self._since = 0
        self._prompts = self._generation = False  # what the model was fitted to

    @property
    def learns(self) -> bool:
        """False if the model stays what it is, whatever `add` is told."""
        return self._every > 0

    def add(self, record: StepRecord) -> None:
        """A pass has run."""
        if not self._every:
            return
        self._recent.append(record)
        self._since += 1
        if self._since >= self._every:
            self._since = 0
            self.model = LinearCost.fit(self._recent)
            self._prompts = any(step.work.prompt_tokens for step in self._recent)
            self._generation = any(step.work.sequences for step in self._recent)

    def tell(self, load: Load) -> Load:
        """`load` with the costs in it, as far as they are measured: an engine that has computed no
        prompts lately knows nothing of those, one that has generated nothing knows nothing of
        that."""
        model = self.model
        if self._prompts:
            load = replace(load, prefill_base=model.base, prefill_per_token=model.per_token)
        if self._generation:
            load = replace(load, token_seconds=model.base + model.per_sequence)
        return load
