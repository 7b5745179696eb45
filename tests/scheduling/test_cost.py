from __future__ import annotations

import random
from dataclasses import astuple

import pytest

from baton.types import Load, Request, Sampling, Stopping
from scheduling.cost import CostTracker, LinearCost, StepRecord, Work
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence


def test_a_pass_costs_its_prompt_tokens_their_attention_and_the_context_of_generation() -> None:
    sequence = Sequence.start(Request("r", (1,) * 50, Sampling(), Stopping(4)), 0, now=0.0)
    plan = StepPlan((Chunk(sequence, 30, 20, sample=True), Chunk(sequence, 41, 1, sample=True)))
    work = Work(prompt_tokens=20, attention=20 * 50, sequences=1, context=42)
    assert Work.of(plan) == work
    cost = LinearCost(1.0, 0.1, 0.001, 0.01, 0.0001)
    assert cost.of(plan) == pytest.approx(1.0 + 20 * 0.1 + 1000 * 0.001 + 0.01 + 42 * 0.0001)
    assert StepRecord.of(plan, 2.0) == StepRecord(work, 2.0)


def test_the_first_iteration_is_a_pass_with_the_prompt_alone() -> None:
    cost = LinearCost(1.0, 0.1, 0.001, 0.01, 0.0001)
    assert cost.first_iteration(30) == cost.seconds(Work(prompt_tokens=30, attention=900))


def test_the_fit_recovers_the_model_from_noisy_steps() -> None:
    true, rng = LinearCost(0.004, 3e-5, 4e-8, 2e-4, 2e-7), random.Random(1)
    steps = []
    for _ in range(800):
        tokens, sequences = rng.randint(0, 512), rng.randint(0, 64)
        attention = tokens * rng.randint(1, 1024)
        work = Work(tokens, attention, sequences, sequences * rng.randint(1, 1000))
        steps.append(StepRecord(work, true.seconds(work) * rng.gauss(1.0, 0.02)))
    found = LinearCost.fit(steps)
    for got, expected in zip(astuple(found), astuple(true), strict=True):
        assert got == pytest.approx(expected, rel=0.1)


def test_no_coefficient_is_ever_negative() -> None:
    steps = [StepRecord(Work(tokens, 100 * tokens), 0.02 - 0.0001 * tokens) for tokens in range(50)]
    found = LinearCost.fit(steps)
    assert min(astuple(found)) >= 0
    assert found.base == pytest.approx(0.0175, rel=0.02)


def test_long_prompts_do_not_drown_short_steps() -> None:
    """Each long prompt takes a tenth more or less than the model says: a hundred short steps."""
    true = LinearCost(0.002, 0.002, 0.0, 0.001)
    works = [Work(prompt_tokens=n) for n in (500, 505, 510, 515)]
    steps = [StepRecord(w, true.seconds(w) * (0.9 + 0.2 * (i % 2))) for i, w in enumerate(works)]
    steps += [StepRecord(w, true.seconds(w)) for n in range(1, 9) if (w := Work(sequences=n))]
    found = LinearCost.fit(steps)
    assert found.seconds(Work(sequences=1)) == pytest.approx(0.003, rel=0.02)


def test_one_step_is_enough_for_a_guess_and_none_is_refused() -> None:
    work = Work(10, 100)
    assert LinearCost.fit([StepRecord(work, 0.5)]).seconds(work) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no steps"):
        LinearCost.fit([])


def test_a_tracker_tells_only_what_it_has_measured() -> None:
    load = Load(running=1, waiting=2, free_blocks=3, total_blocks=4)
    prompts = [StepRecord(Work(prompt_tokens=n), 0.01 + 0.002 * n) for n in (8, 16, 32, 64)]
    steps = [StepRecord(Work(sequences=n), 0.01 + 0.001 * n) for n in (1, 2, 4, 8)]
    tracker = CostTracker(LinearCost(1.0, 1.0), every=4, window=8)
    assert tracker.tell(load) == load
    for record in prompts:
        tracker.add(record)
    told = tracker.tell(load)
    assert (told.prefill_base, told.prefill_per_token) == pytest.approx((0.01, 0.002))
    assert (told.token_seconds, told.running) == (0.0, 1)
    for record in steps:
        tracker.add(record)
    assert tracker.tell(load).token_seconds == pytest.approx(0.011)
    for record in steps * 2:
        tracker.add(record)
    told = tracker.tell(load)  # the prompts are forgotten
    assert (told.prefill_base, told.prefill_per_token) == (0.0, 0.0)
    assert told.token_seconds == pytest.approx(0.011)
