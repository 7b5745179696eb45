"""Ranks on GPUs of their own: what only NCCL, CUDA graphs and several devices can show."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from baton.types import Sampling
from engine.executor import ExecutorBroken
from engine.gpu.executor import GpuExecutor
from engine.gpu.memory import _MARGIN
from engine.load import load_executor
from engine.model.runner import TorchExecutor
from scheduling.plan import StepPlan, Swap
from tests.engine.conftest import Driver, TinyModel
from tests.engine.parallel.conftest import children

Model = Callable[[str], TinyModel]
Load = Callable[..., TorchExecutor]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs"),
]

OPTIONS: dict[str, Any] = {
    "device": "cuda",
    "block_size": 16,
    "kv_blocks": 64,
    "max_batch_tokens": 32,
    "max_batch_sequences": 8,
    "host_kv_memory": 2**20,
}
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [100] * 20, [3])


@pytest.fixture
def on_gpus(model: Model) -> Iterator[Load]:
    """`on_gpus(name, tensor, pipeline)`: an executor that is warm, closed at the end."""
    made: list[TorchExecutor] = []

    def make(name: str, tensor: int = 1, pipeline: int = 1, **options: Any) -> TorchExecutor:
        degrees = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
        made.append(load_executor(model(name).path, **OPTIONS | degrees | options))
        made[-1].warm_up()
        return made[-1]

    yield make
    for executor in made:
        executor.close()


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"),
    [("llama", 2, 1), ("mistral", 1, 2), ("qwen3", 2, 2)],
)
def test_gpus_generate_what_one_does(
    model: Model, on_gpus: Load, name: str, tensor: int, pipeline: int
) -> None:
    if torch.cuda.device_count() < tensor * pipeline:
        pytest.skip("there are not so many GPUs")
    executor = on_gpus(name, tensor, pipeline)
    driver = Driver(executor, budget=32)
    sequences = [driver.add(prompt, 12) for prompt in PROMPTS]
    driver.run()
    for prompt, sequence in zip(PROMPTS, sequences, strict=True):
        output = sequence.tokens[len(prompt) :]
        model(name).assert_generates(prompt, output, rounding=1e-2)
    if pipeline == 1:
        assert isinstance(executor, GpuExecutor)
        assert executor.taken > 0  # graphs, and passes ahead of their plans


def test_seeded_tokens_are_those_of_one_gpu(on_gpus: Load) -> None:
    outputs = []
    for tensor in (1, 2):
        driver = Driver(on_gpus("llama", tensor), budget=32)
        sampling = Sampling(temperature=0.8, top_k=20, seed=4)
        sequences = [driver.add(prompt, 8, sampling=sampling) for prompt in PROMPTS]
        driver.run()
        outputs.append([sequence.tokens for sequence in sequences])
    assert outputs[0] == outputs[1]


def test_kv_is_saved_loaded_and_swapped_by_all_gpus(model: Model, on_gpus: Load) -> None:
    prompt = list(range(5, 30))
    first, second = (Driver(on_gpus("qwen3", 2), budget=32, seed=seed) for seed in (0, 1))
    filled, taken = first.add(prompt, 2), second.add(prompt, 12)
    first.step()
    source, target = first.executor.staging, second.executor.staging
    assert source is not None
    assert target is not None
    source.save(filled.blocks)
    taken.blocks = [second.free.pop() for _ in filled.blocks]
    for here, there in zip(filled.blocks, taken.blocks, strict=True):
        target.block(there)[:] = source.block(here)
    target.load(taken.blocks)
    taken.append(filled.tokens[-1])
    taken.computed = len(prompt)
    second.step()
    for number, pages in enumerate((taken.blocks, [second.free.pop() for _ in taken.blocks])):
        swap = Swap(number, taken, tuple(pages), tuple(range(len(pages))))
        plan = StepPlan((), swap_in=(swap,)) if number else StepPlan((), swap_out=(swap,))
        assert second.executor.execute(plan).swapped == (number,)
        taken.blocks = pages
    second.run()
    model("qwen3").assert_generates(prompt, taken.tokens[len(prompt) :], rounding=1e-2)


def test_kv_takes_what_is_left_on_the_fullest_gpu(on_gpus: Load) -> None:
    free, total = torch.cuda.mem_get_info(1)
    left = 3 * 2**30  # of the second GPU, beside the margin
    full = torch.empty(int(free - _MARGIN * total) - left, dtype=torch.uint8, device="cuda:1")
    sizes = {"kv_blocks": 0, "max_batch_sequences": 10**5, "host_kv_memory": 0}
    executor = on_gpus("llama", 2, **sizes)
    each = executor.pool.blocks * executor.pool.block_bytes // 2
    assert 0 < each < left
    del full


def test_a_gpu_that_is_lost_ends_the_wait_of_the_others(on_gpus: Load) -> None:
    before = children()
    executor = on_gpus("llama", 2)
    (rank,) = children() - before
    driver = Driver(executor, budget=32)
    driver.add(PROMPTS[0], 20)
    assert driver.step()
    os.kill(rank, signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(ExecutorBroken, match="rank 1 ended with"):
        driver.run()
    assert time.monotonic() - begun < 30
