from __future__ import annotations

import pytest

from baton.types import Request, Sampling, Stopping
from scheduling.cost import LinearCost
from scheduling.plan import Chunk, Sampled, StepPlan, Swap
from scheduling.sequence import Sequence
from scheduling.simulator.executor import CostExecutor
from scheduling.simulator.traffic import EOS, PLAIN

COST = LinearCost(base=1.0, per_token=0.1, per_sequence=0.5)


def _sequence(prompt: int = 4) -> Sequence:
    return Sequence.start(Request("r", (0,) * prompt, Sampling(), Stopping(100)), 0, now=0.0)


def _swap(number: int, blocks: int) -> Swap:
    return Swap(number, _sequence(), tuple(range(blocks)), tuple(range(blocks)))


def test_a_pass_takes_what_the_cost_model_says_and_ends_each_job_at_its_length() -> None:
    executor, sequence = CostExecutor(COST), _sequence(4)
    executor.expect(sequence, output_tokens=2)
    assert executor.remaining(sequence) == 2
    first = executor.execute(StepPlan((Chunk(sequence, 0, 4, sample=True),)), 0.0)
    assert first.seconds == pytest.approx(1.4)
    assert first.sampled == (Sampled(PLAIN),)
    sequence.append(PLAIN)
    last = executor.execute(StepPlan((Chunk(sequence, 4, 1, sample=True),)), 5.0)
    assert last.seconds == pytest.approx(1.5)
    assert last.sampled == (Sampled(EOS),)


def test_a_chunk_that_does_not_sample_samples_nothing() -> None:
    executor, sequence = CostExecutor(COST), _sequence(4)
    executor.expect(sequence, output_tokens=1)
    result = executor.execute(StepPlan((Chunk(sequence, 0, 3, sample=False),)), 0.0)
    assert result.sampled == (None,)
    assert result.prompt_logprobs == ((),)


def test_swaps_run_beside_the_passes_in_one_queue_per_direction() -> None:
    executor = CostExecutor(LinearCost(base=1.0), swap_seconds_per_block=0.4)
    sequence = _sequence(1)
    executor.expect(sequence, 50)
    chunk = Chunk(sequence, 0, 1, sample=True)
    out = (_swap(1, 2), _swap(2, 2))  # end at 0.8 and 1.6
    begun = executor.execute(StepPlan((chunk,), swap_out=out, swap_in=(_swap(3, 1),)), 0.0)
    assert begun.seconds == pytest.approx(1.0)
    assert begun.swapped == (1, 3)
    later = executor.execute(StepPlan((chunk,)), 1.0)
    assert later.swapped == (2,)
    assert executor.execute(StepPlan((chunk,)), 2.0).swapped == ()
    assert executor.stall_seconds == 0.0


def test_with_swaps_first_the_pass_waits_and_those_in_wait_for_those_out() -> None:
    executor = CostExecutor(LinearCost(base=1.0), swap_seconds_per_block=0.5)
    sequence = _sequence(1)
    executor.expect(sequence, 50)
    plan = StepPlan(
        (Chunk(sequence, 0, 1, sample=True),),
        swap_out=(_swap(1, 2),),
        swap_in=(_swap(2, 4),),
        swaps_first=True,
    )
    result = executor.execute(plan, 10.0)
    assert result.seconds == pytest.approx(1.0 + 2.0 + 1.0)
    assert set(result.swapped) == {1, 2}
    assert executor.stall_seconds == pytest.approx(3.0)


def test_a_plan_without_chunks_waits_for_one_swap() -> None:
    executor = CostExecutor(LinearCost(base=1.0), swap_seconds_per_block=0.5)
    result = executor.execute(StepPlan((), swap_out=(_swap(1, 1), _swap(2, 1))), 3.0)
    assert result.seconds == pytest.approx(0.5)
    assert result.swapped == (1,)
    assert executor.execute(StepPlan(()), 3.5).swapped == (2,)
    with pytest.raises(RuntimeError, match="no swap"):
        executor.execute(StepPlan(()), 4.0)
