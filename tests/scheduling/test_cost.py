from __future__ import annotations

import random

import pytest

from baton.types import Request, Sampling, Stopping
from scheduling.cost import LinearCost, StepRecord
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence


def test_a_pass_costs_its_tokens_and_the_context_that_they_read() -> None:
    sequence = Sequence.start(Request("r", (1,) * 50, Sampling(), Stopping(4)), 0, now=0.0)
    plan = StepPlan((Chunk(sequence, 30, 20, sample=True), Chunk(sequence, 0, 5, sample=False)))
    assert LinearCost(1.0, 0.1, 0.01).of(plan) == pytest.approx(1.0 + 25 * 0.1 + 55 * 0.01)
    assert StepRecord.of(plan, 2.0) == StepRecord(tokens=25, context=55, seconds=2.0)


def test_the_fit_recovers_the_model_from_noisy_steps() -> None:
    true, rng = LinearCost(0.004, 3e-5, 2e-7), random.Random(1)
    steps = []
    for _ in range(500):
        tokens, context = rng.randint(1, 512), rng.randint(100, 60_000)
        seconds = true.seconds(tokens, context) * rng.gauss(1.0, 0.02)
        steps.append(StepRecord(tokens, context, seconds))
    found = LinearCost.fit(steps)
    assert found.base == pytest.approx(true.base, rel=0.1)
    assert found.per_token == pytest.approx(true.per_token, rel=0.1)
    assert found.per_context == pytest.approx(true.per_context, rel=0.1)


def test_no_coefficient_is_ever_negative() -> None:
    steps = [StepRecord(tokens, 100 * tokens, 0.02 - 0.0001 * tokens) for tokens in range(1, 50)]
    found = LinearCost.fit(steps)
    assert min(found.base, found.per_token, found.per_context) >= 0
    assert found.base == pytest.approx(0.0175, rel=0.01)


def test_one_step_is_enough_for_a_guess_and_none_is_refused() -> None:
    assert LinearCost.fit([StepRecord(10, 100, 0.5)]).seconds(10, 100) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no steps"):
        LinearCost.fit([])
