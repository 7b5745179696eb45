"""Ranks that run Triton's kernels, each with a KV pool of its own, as on GPUs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from baton.types import Request, Sampling, Stopping
from engine.executor import ExecutorBroken, Pipeline
from engine.load import load_executor
from engine.model.runner import TorchExecutor
from engine.staged import saving
from scheduling.plan import StepPlan, Swap
from scheduling.rules import Rules
from scheduling.sequence import Sequence
from tests.engine.conftest import Driver, TinyModel
from tests.engine.parallel.conftest import OPTIONS, SWAPPING, TRITON, children
from tests.engine.test_swapped_generation import Run

Ranks = Callable[..., TorchExecutor]
Model = Callable[[str], TinyModel]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")

PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [100] * 9, [3])


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"),
    [
        ("small-llama", 2, 1),  # biases everywhere, a tied head, one key head for both
        ("small-mistral", 1, 2),  # windows
        ("small-qwen3", 2, 2),  # norms of heads
    ],
)
def test_ranks_generate_what_one_does(
    model: Model, ranks: Ranks, name: str, tensor: int, pipeline: int
) -> None:
    driver = Driver(ranks(name, tensor, pipeline, **SWAPPING), budget=16)
    sequences = [driver.add(prompt, 4) for prompt in PROMPTS]
    driver.step()
    driver.step()
    driver.preempt(sequences[0])
    driver.run()
    for prompt, sequence in zip(PROMPTS, sequences, strict=True):
        model(name).assert_generates(prompt, sequence.tokens[len(prompt) :])


@pytest.mark.parametrize(("name", "tensor", "pipeline"), [("small-qwen3", 2, 2)])
def test_sampling_and_logprobs_are_those_of_one_rank(
    ranks: Ranks, one: Ranks, name: str, tensor: int, pipeline: int
) -> None:
    def generate(executor: TorchExecutor) -> tuple[list[list[int]], list[float]]:
        driver = Driver(executor, budget=16)
        sampled = driver.add([9, 8, 7, 6, 5], 3, sampling=Sampling(temperature=1.5, seed=3))
        told = driver.add([4, 5, 6], 2, logprobs=3, prompt_logprobs=2)
        driver.run()
        return [s.tokens for s in (sampled, told)], driver.logprobs()

    expected, logprobs = generate(one(name))
    found, theirs = generate(ranks(name, tensor, pipeline, **SWAPPING))
    assert found == expected
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(logprobs), atol=1e-3, rtol=1e-3)


def test_weights_are_quantized_as_on_one_rank(ranks: Ranks, one: Ranks) -> None:
    options = TRITON | {"quantization": "int8"}
    outputs = []
    for executor in (one("small-qwen3", **options), ranks("small-qwen3", 2, 1, **options)):
        assert executor.weight_dtype == "int8"
        driver = Driver(executor, budget=16)
        sequence = driver.add(PROMPTS[0], 4)
        driver.run()
        outputs.append(sequence.tokens)
    assert outputs[0] == outputs[1]


# -- The hand-off ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline", "options"),
    [
        ("small-llama", 2, 1, SWAPPING),
        ("small-qwen3", 2, 2, SWAPPING),
        ("small-qwen3", 2, 1, TRITON | {"kv_dtype": "int8"}),
    ],
)
def test_what_ranks_save_is_the_pool_of_one(
    ranks: Ranks, one: Ranks, name: str, tensor: int, pipeline: int, options: dict[str, Any]
) -> None:
    """Block for block, so that KV can be handed over between workers of any degrees."""
    pools, numbers = [], options.get("kv_dtype", "auto")
    for executor in (one(name, kv_dtype=numbers), ranks(name, tensor, pipeline, **options)):
        driver = Driver(executor, budget=16)
        sequence = driver.add(range(3, 14), 2)
        driver.step()
        if executor.staging is not None:
            executor.staging.save(sequence.blocks)
        pool = executor.pool
        for layer in range(2):
            for plane, scales in zip(
                (pool.keys(layer), pool.values(layer)),
                pool.scales(layer) or (None, None),
                strict=True,
            ):
                found = plane[sequence.blocks].float()
                if scales is not None:
                    found = found * scales[sequence.blocks, :, :, None]
                pools.append(found.flatten(0, 1)[:11])  # behind it there may be a guess
        driver.run()
    half = len(pools) // 2
    for expected, found in zip(pools[:half], pools[half:], strict=True):
        assert expected.abs().sum() > 0
        torch.testing.assert_close(
            found, expected, atol=1e-4 if numbers == "auto" else 0.05, rtol=0
        )


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"), [("small-llama", 2, 1), ("small-qwen3", 2, 2)]
)
def test_kv_of_any_degree_is_understood_by_any_other(
    model: Model, ranks: Ranks, one: Ranks, name: str, tensor: int, pipeline: int
) -> None:
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    several, single = ranks(name, tensor, pipeline, **SWAPPING), one(name)
    for source, target in ((several, single), (single, several)):
        first, second = Driver(source, budget=16), Driver(target, budget=16, seed=1)
        if source.staging is not None:
            first.executor = saving(source, source.staging)  # type: ignore[assignment]
        filled, taken = first.add(prompt, 4), second.add(prompt, 4)
        assert first.step()
        taken.blocks = [second.free.pop() for _ in filled.blocks]
        for here, there in zip(filled.blocks, taken.blocks, strict=True):
            target.pool.block(there)[:] = source.pool.block(here)
        if target.staging is not None:
            target.staging.load(taken.blocks)
        taken.append(filled.tokens[-1])
        taken.computed = len(prompt)
        second.run()
        model(name).assert_generates(prompt, taken.tokens[len(prompt) :])


def test_a_pipeline_saves_what_each_of_its_passes_has_finished(model: Model, ranks: Ranks) -> None:
    executor = ranks("small-mistral", 1, 2, **SWAPPING)
    assert executor.staging is not None
    prefill = saving(executor, executor.staging)
    assert isinstance(prefill, Pipeline)
    driver = Driver(executor, budget=16)
    sequences = [driver.add(prompt, 2) for prompt in ([5] * 6, [7] * 6)]
    plans = [StepPlan((driver._chunk(sequence, 6),)) for sequence in sequences]
    for sequence in sequences:
        for block in sequence.blocks:
            executor.pool.block(block)[:] = bytes(executor.pool.block_bytes)
    handles = [prefill.submit(plan) for plan in plans]
    for handle, sequence in zip(handles, sequences, strict=True):
        (sampled,) = prefill.result(handle).sampled
        assert sampled is not None
        model("small-mistral").assert_generates(sequence.tokens, [sampled.token_id])
        assert all(any(executor.pool.block(block)) for block in sequence.blocks)


# -- Swaps -------------------------------------------------------------------------------------


def _swap(number: int, sequence: Sequence) -> Swap:
    return Swap(number, sequence, tuple(sequence.blocks), tuple(sequence.host_blocks))


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"), [("small-llama", 2, 1), ("small-qwen3", 2, 2)]
)
def test_a_sequence_goes_on_when_its_kv_is_back_on_all_ranks(
    model: Model, ranks: Ranks, name: str, tensor: int, pipeline: int
) -> None:
    executor = ranks(name, tensor, pipeline, **SWAPPING)
    driver = Driver(executor, budget=16)
    away = driver.add(PROMPTS[0], 4)
    driver.step()
    driver.step()
    away.host_blocks = list(range(len(away.blocks)))
    driver.running.remove(away)
    swap = _swap(1, away)
    result = executor.execute(StepPlan((), swap_out=(swap,)))
    assert result.swapped == (1,)
    driver.free, freed = away.blocks, driver.free  # others take just these
    other = driver.add([60, 61, 62, 63, 64], 3)
    driver.run()
    model(name).assert_generates([60, 61, 62, 63, 64], other.tokens[5:])
    away.blocks, driver.free = [freed.pop() for _ in away.host_blocks], freed + driver.free
    result = executor.execute(StepPlan((), swap_in=(_swap(2, away),)))
    assert result.swapped == (2,)
    driver.running.append(away)
    driver.run()
    model(name).assert_generates(PROMPTS[0], away.tokens[len(PROMPTS[0]) :])


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"), [("small-llama", 2, 1), ("small-mistral", 1, 2)]
)
def test_a_scheduler_short_of_blocks_swaps_and_changes_no_token(
    model: Model, ranks: Ranks, name: str, tensor: int, pipeline: int
) -> None:
    """Swaps go on beside passes, some of which are begun ahead of their plans."""
    executor = ranks(name, tensor, pipeline, **SWAPPING | {"kv_blocks": 7})
    rules = Rules(preemption="swap", swapping="proactive", ahead=True)
    run = Run(executor, rules, "skip-join-mlfq")
    prompts = [tuple(range(3 + 40 * i, 10 + 42 * i)) for i in range(3)]
    for index, prompt in enumerate(prompts):
        run.submit(Request(f"{index}", prompt, Sampling(), Stopping(max_tokens=6)))
        run.step()
    run.run()
    for index, prompt in enumerate(prompts):
        assert len(run.tokens[f"{index}"]) == 6
        model(name).assert_generates(prompt, run.tokens[f"{index}"])
    assert run.scheduler.counters.swapped_in > 0
    assert run.scheduler.load().free_blocks == 7


# -- Losses ------------------------------------------------------------------------------------


def test_a_rank_that_dies_is_noticed_by_who_waits_for_its_kv(model: Model) -> None:
    before = children()
    executor = load_executor(model("small-llama").path, tensor_parallel=2, **OPTIONS | SWAPPING)
    (rank,) = children() - before
    assert executor.staging is not None
    executor.staging.save([0])
    os.kill(rank, signal.SIGSTOP)
    sequence = Driver(executor, budget=16).add([5, 6], 1)
    sequence.blocks, sequence.host_blocks = [1], [0]
    executor._swapper.swap_out([_swap(1, sequence)])
    os.kill(rank, signal.SIGKILL)
    with pytest.raises(ExecutorBroken, match="KV was lost"):
        executor.execute(StepPlan(()))
    with pytest.raises(ExecutorBroken, match="rank 1 ended with"):
        executor.staging.load([0])
    executor.close()
