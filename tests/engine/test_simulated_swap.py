"""Swapping without a device: when copies end, and that using blocks too early shows."""

from __future__ import annotations

from typing import Any

import pytest

from baton.types import Request, Sampling, Stopping
from engine.simulated import CostModelExecutor, checksum_token, expected_tokens
from scheduling.cost import LinearCost
from scheduling.plan import Capacity, Chunk, StepPlan, StepResult, Swap
from scheduling.sequence import Sequence

CAPACITY = Capacity(
    blocks=8, block_size=4, max_tokens=16, max_sequences=4, max_context=32, host_blocks=6
)
LENGTH = 6  # of prompts: two blocks


def make(swap_seconds_per_block: float = 1.0) -> CostModelExecutor:
    """One second a pass, one second a block."""
    cost = LinearCost(1.0, 0.0, 0.0)
    return CostModelExecutor(CAPACITY, cost, swap_seconds_per_block=swap_seconds_per_block)


def sequence(seed: int, blocks: list[int]) -> Sequence:
    """A sequence with a prompt of its own."""
    prompt = tuple(range(10 * seed, 10 * seed + LENGTH))
    made = Sequence.start(Request("r", prompt, Sampling(), Stopping(10)), 0, now=0.0)
    made.blocks = blocks
    return made


def run(executor: CostModelExecutor, s: Sequence, **swaps: Any) -> StepResult:
    """One pass over what the sequence lacks; takes the token."""
    chunk = Chunk(s, s.computed, s.uncomputed, sample=True)
    result = executor.execute(StepPlan((chunk,), **swaps))
    (sampled,) = result.sampled
    assert sampled is not None
    s.computed = len(s.tokens)
    s.append(sampled.token_id)
    return result


def correct(s: Sequence) -> bool:
    """Whether the sequence has generated what it must."""
    output = s.tokens[LENGTH:]
    return output == expected_tokens(s.request, 0, checksum_token(1000))[: len(output)]


def swap(number: int, s: Sequence, device: list[int], host: list[int]) -> Swap:
    """A swap of a sequence, either way."""
    return Swap(number, s, tuple(device), tuple(host))


def wait(executor: CostModelExecutor, **swaps: Any) -> StepResult:
    """A plan without chunks."""
    return executor.execute(StepPlan((), **swaps))


def test_a_sequence_goes_on_where_it_was_after_coming_back_to_other_blocks() -> None:
    executor, s, other = make(), sequence(1, [3, 1]), sequence(2, [3, 1])
    run(executor, s)
    wait(executor, swap_out=(swap(0, s, [3, 1], [5, 0]),))
    run(executor, other)  # takes its blocks
    s.blocks = [6, 2]
    wait(executor, swap_in=(swap(1, s, [6, 2], [5, 0]),))
    run(executor, s)
    run(executor, other)
    assert correct(s)
    assert correct(other)


def test_swaps_go_on_beside_passes_and_are_named_when_they_end() -> None:
    executor, s, other = make(), sequence(1, [3, 1]), sequence(2, [0, 2])
    run(executor, s)
    first = run(executor, other, swap_out=(swap(7, s, [3, 1], [5, 0]),))
    second = run(executor, other)
    third = run(executor, other)
    assert [first.swapped, second.swapped, third.swapped] == [(), (7,), ()]
    assert first.seconds == 1.0


def test_copies_of_one_direction_queue_and_the_other_direction_is_not_in_their_way() -> None:
    executor = make()
    a, b, c = (sequence(seed, [2 * seed, 2 * seed + 1]) for seed in range(3))
    for s in (a, b, c):
        run(executor, s)
    outs = (swap(0, a, a.blocks, [0, 1]), swap(1, b, b.blocks, [2, 3]))
    assert wait(executor, swap_out=(swap(9, c, c.blocks, [4, 5]),)).swapped == (9,)
    ended = wait(executor, swap_out=outs, swap_in=(swap(2, c, c.blocks, [4, 5]),))
    assert (ended.swapped, ended.seconds) == ((0, 2), 2.0)
    ended = wait(executor)
    assert (ended.swapped, ended.seconds) == ((1,), 2.0)


def test_a_plan_without_chunks_waits_for_the_rest_of_a_copy_only() -> None:
    executor, s, other = make(), sequence(1, [3, 1]), sequence(2, [0, 2])
    run(executor, s)
    run(executor, other, swap_out=(swap(0, s, [3, 1], [5, 0]),))
    rest = wait(executor)
    assert (rest.swapped, rest.seconds) == ((0,), 1.0)
    nothing = wait(executor)
    assert (nothing.swapped, nothing.seconds) == ((), 0.0)


def test_a_pass_that_waits_may_use_what_its_swaps_free_and_bring() -> None:
    executor, s, other = make(), sequence(1, [3, 1]), sequence(2, [0, 2])
    run(executor, s)
    run(executor, other)
    wait(executor, swap_out=(swap(0, other, [0, 2], [1, 2]),))
    other.blocks = [1, 3]  # those that the swap out of the same plan frees
    result = run(
        executor,
        other,
        swap_out=(swap(1, s, [3, 1], [5, 0]),),
        swap_in=(swap(2, other, [1, 3], [1, 2]),),
        swaps_first=True,
    )
    assert (result.swapped, result.seconds) == ((1, 2), 2.0 + 2.0 + 1.0)
    assert correct(other)
    s.blocks = [4, 5]
    run(executor, s, swap_in=(swap(3, s, [4, 5], [5, 0]),), swaps_first=True)
    assert correct(s)


def test_a_pass_that_waits_for_its_own_swaps_names_older_ones_too() -> None:
    executor, s, other = make(), sequence(1, [3, 1]), sequence(2, [0, 2])
    run(executor, s)
    run(executor, other, swap_out=(swap(0, s, [3, 1], [0, 1]),))
    wait(executor, swap_out=(swap(1, other, [0, 2], [2, 3]),))
    result = wait(executor, swap_in=(swap(2, s, [4, 5], [0, 1]),), swaps_first=True)
    assert result.swapped == (1, 2)


def test_reusing_the_blocks_of_a_swap_out_before_its_end_gives_wrong_tokens() -> None:
    executor, s, other = make(), sequence(1, [3, 1]), sequence(2, [3, 1])
    run(executor, s)
    run(executor, other, swap_out=(swap(0, s, [3, 1], [5, 0]),))  # too early
    wait(executor)
    s.blocks = [6, 2]
    wait(executor, swap_in=(swap(1, s, [6, 2], [5, 0]),))
    run(executor, s)
    assert not correct(s)


def test_running_a_sequence_before_its_swap_in_has_ended_gives_wrong_tokens() -> None:
    executor, s, other = make(), sequence(1, [3, 1]), sequence(2, [0, 2])
    run(executor, s)
    wait(executor, swap_out=(swap(0, s, [3, 1], [5, 0]),))
    run(executor, other, swap_in=(swap(1, s, [3, 1], [5, 0]),))
    run(executor, s)  # too early, though the very same bytes are coming
    assert not correct(s)


def test_a_swap_in_to_blocks_that_are_in_use_spoils_them_at_once() -> None:
    executor, s, other = make(), sequence(1, [3, 1]), sequence(2, [0, 2])
    run(executor, s)
    run(executor, other)
    wait(executor, swap_out=(swap(0, s, [3, 1], [5, 0]),))
    run(executor, other, swap_in=(swap(1, s, [0, 2], [5, 0]),))
    assert not correct(other)


@pytest.mark.parametrize("seconds", [0.0, 0.25])
def test_time_is_slept_with_the_wait_in_it(seconds: float) -> None:
    naps: list[float] = []
    executor = CostModelExecutor(
        CAPACITY, LinearCost(1.0, 0, 0), swap_seconds_per_block=seconds, sleep=naps.append
    )
    s = sequence(1, [3, 1])
    run(executor, s)
    wait(executor, swap_out=(swap(0, s, [3, 1], [5, 0]),))
    assert naps == [1.0, 2 * seconds]
