from __future__ import annotations

import pytest

from baton.types import Request, Sampling, Stopping
from engine.simulated import CostModelExecutor, checksum_token, expected_tokens
from scheduling.cost import LinearCost
from scheduling.plan import Capacity, Chunk, StepPlan
from scheduling.sequence import Sequence

CAPACITY = Capacity(blocks=8, block_size=4, max_tokens=16, max_sequences=4, max_context=32)


def sequence(seed: int = 0, index: int = 0, blocks: list[int] | None = None, **fields) -> Sequence:
    request = Request("r", (5, 6, 7, 8, 9, 10), Sampling(n=2, seed=seed), Stopping(4), **fields)
    made = Sequence.start(request, index, now=0.0)
    made.blocks = [3, 1] if blocks is None else blocks
    return made


def whole(s: Sequence) -> StepPlan:
    return StepPlan((Chunk(s, 0, len(s.tokens), sample=True),))


def test_tokens_depend_on_prompt_seed_and_index_only() -> None:
    executor = CostModelExecutor(CAPACITY)
    tokens = {
        (seed, index): executor.execute(whole(sequence(seed, index))).sampled
        for seed in (0, 5)
        for index in (0, 1)
    }
    assert len(set(tokens.values())) == 4
    again = CostModelExecutor(CAPACITY).execute(whole(sequence(5, 1, blocks=[0, 7]))).sampled
    assert again == tokens[5, 1]


def test_a_cut_prompt_gives_the_same_token_and_only_its_last_chunk_samples() -> None:
    s = sequence()
    executor = CostModelExecutor(CAPACITY)
    first = executor.execute(StepPlan((Chunk(s, 0, 5, sample=False),)))
    last = executor.execute(StepPlan((Chunk(s, 5, 1, sample=True),)))
    assert first.sampled == (None,)
    expected = expected_tokens(s.request, 0, checksum_token(1000))[0]
    assert [t.token_id for t in last.sampled if t] == [expected]


def test_kv_that_somebody_overwrote_gives_another_token() -> None:
    s = sequence()
    executor = CostModelExecutor(CAPACITY)
    executor.execute(StepPlan((Chunk(s, 0, 5, sample=False),)))
    executor.store.block(3)[:4] = b"\0\0\0\0"
    (sampled,) = executor.execute(StepPlan((Chunk(s, 5, 1, sample=True),))).sampled
    assert sampled
    assert sampled.token_id != expected_tokens(s.request, 0, checksum_token(1000))[0]


def test_kv_moves_between_two_executors_as_bytes() -> None:
    here, there = CostModelExecutor(CAPACITY), CostModelExecutor(CAPACITY)
    source, target = sequence(blocks=[3, 1]), sequence(blocks=[0, 2])
    here.execute(whole(source))
    for a, b in zip(source.blocks, target.blocks, strict=True):
        there.store.block(b)[:] = here.store.block(a)
    for s in (source, target):
        s.append(99)
    step = [StepPlan((Chunk(s, 6, 1, sample=True),)) for s in (source, target)]
    assert here.execute(step[0]).sampled == there.execute(step[1]).sampled
    assert (here.store.blocks, here.store.block_bytes) == (8, 16)


def test_logprobs_come_where_they_were_asked_for() -> None:
    s = sequence(logprobs=2, prompt_logprobs=0)
    executor = CostModelExecutor(CAPACITY)
    first = executor.execute(StepPlan((Chunk(s, 0, 4, sample=False),)))
    last = executor.execute(StepPlan((Chunk(s, 4, 2, sample=True),)))
    assert [p.token_id for p in first.prompt_logprobs[0]] == [6, 7, 8, 9]
    assert [p.token_id for p in last.prompt_logprobs[0]] == [10]
    (sampled,) = last.sampled
    assert sampled
    assert sampled.logprob
    assert len(sampled.logprob.top) == 2


def test_time_is_the_cost_models_and_is_slept_only_on_request() -> None:
    naps: list[float] = []
    executor = CostModelExecutor(CAPACITY, LinearCost(1.0, 0.5, 0.25), sleep=naps.append)
    assert executor.execute(whole(sequence())).seconds == pytest.approx(
        1.0 + 6 * 0.5 + 6 * 6 * 0.25
    )
    assert naps == [pytest.approx(13.0)]
