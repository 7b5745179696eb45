"""A model over several ranks generates what it does on one; and what a lost rank does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.parallel.load
from baton.errors import ConfigError
from baton.types import Output, Request, Sampling, Stopping
from engine.executor import ExecutorBroken, Pipeline
from engine.load import load_executor
from engine.model.runner import TorchExecutor
from scheduling.decode import DecodeScheduler
from scheduling.order import make_policy
from scheduling.plan import Chunk, StepPlan
from tests.engine.conftest import Driver, TinyModel
from tests.engine.parallel.conftest import OPTIONS, children

Ranks = Callable[..., TorchExecutor]
Model = Callable[[str], TinyModel]

PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [100] * 20, [3])


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"),
    [
        ("llama", 2, 1),  # biases everywhere, a tied head
        ("qwen2", 4, 1),  # more shards than key heads
        ("mistral", 1, 2),  # windows
        ("qwen3", 2, 2),  # norms of heads
    ],
)
def test_ranks_generate_what_one_does(
    model: Model, ranks: Ranks, name: str, tensor: int, pipeline: int
) -> None:
    driver = Driver(ranks(name, tensor, pipeline), budget=16)
    sequences = [driver.add(prompt, 6) for prompt in PROMPTS]
    driver.run()
    for prompt, sequence in zip(PROMPTS, sequences, strict=True):
        model(name).assert_generates(prompt, sequence.tokens[len(prompt) :])


@pytest.mark.parametrize(("name", "tensor", "pipeline"), [("llama", 2, 1), ("qwen3", 2, 2)])
def test_sampling_and_logprobs_are_those_of_one_rank(
    model: Model, ranks: Ranks, name: str, tensor: int, pipeline: int
) -> None:
    def generate(executor: TorchExecutor) -> tuple[list[list[int]], list[float]]:
        driver = Driver(executor, budget=16)
        sampled = driver.add([9, 8, 7, 6, 5], 5, sampling=Sampling(temperature=1.5, seed=3))
        told = driver.add([4, 5, 6], 4, logprobs=3, prompt_logprobs=2)
        greedy = driver.add([8, 8], 4)
        driver.run()
        return [s.tokens for s in (sampled, told, greedy)], driver.logprobs()

    one = load_executor(model(name).path, **OPTIONS)
    expected, logprobs = generate(one)
    one.close()
    found, theirs = generate(ranks(name, tensor, pipeline))
    assert found == expected
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(logprobs), atol=1e-3, rtol=1e-3)


def _generate(executor: TorchExecutor, requests: list[Request]) -> dict[str, list[int]]:
    """What a scheduler and the executor generate, with as many plans in flight as there may be."""
    scheduler = DecodeScheduler(executor.capacity, make_policy("fcfs"), max_waiting=100)
    for request in requests:
        scheduler.submit(request, 0.0)
    flights: deque[tuple[StepPlan, Any]] = deque()
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    together = 0
    while True:
        if len(flights) < executor.capacity.depth and (plan := scheduler.plan(0.0)) is not None:
            begun = executor.submit(plan) if isinstance(executor, Pipeline) else plan
            flights.append((plan, begun))
            together = max(together, len(flights))
        elif flights:
            plan, begun = flights.popleft()
            result = (
                executor.result(begun) if isinstance(executor, Pipeline) else executor.execute(plan)
            )
            for event in scheduler.apply(plan, result, 0.0):
                if isinstance(event, Output):
                    tokens[event.request_id] += event.token_ids
        else:
            break
    assert together == executor.capacity.depth
    return tokens


@pytest.mark.parametrize(("name", "tensor"), [("mistral", 1), ("qwen3", 2)])
def test_passes_in_flight_in_the_stages_generate_what_one_rank_does(
    model: Model, ranks: Ranks, name: str, tensor: int
) -> None:
    """With sampling, logprobs and prompts that are cut, of more sequences than one pass takes."""
    requests = [
        Request(
            f"r{i}",
            tuple((7 * i + j) % 199 for j in range(3 + 5 * i)),
            Sampling(temperature=0.0 if i % 2 else 1.5, seed=i),
            Stopping(max_tokens=8 - i),
            prompt_logprobs=1 if i == 2 else None,
        )
        for i in range(5)
    ]
    one = load_executor(model(name).path, **OPTIONS)
    expected = _generate(one, requests)
    one.close()
    executor = ranks(name, tensor, 2)
    assert executor.capacity.depth == 2
    assert _generate(executor, requests) == expected


def test_outputs_and_plans_that_fill_the_line_do_not_wait_for_each_other(ranks: Ranks) -> None:
    """The worker tells a rank of the next pass while that one tells it a long output; both more
    than a socket's buffer holds."""
    executor = ranks("mistral", 1, 2)
    assert isinstance(executor, Pipeline)
    driver = Driver(executor, budget=16)
    plans = []
    for _ in range(2):
        told, long = driver.add([5] * 1200, 1, prompt_logprobs=0), driver.add([5] * 8, 1)
        told.blocks, long.blocks, long.tokens = [0] * 150, [0] * 60_000, [5] * 480_000
        chunks = Chunk(told, 0, 1200, sample=False), Chunk(long, 479_992, 8, sample=False)
        plans.append(StepPlan(chunks))
    handles = [executor.submit(plan) for plan in plans]
    for handle in handles:
        assert len(executor.result(handle).prompt_logprobs[0]) == 1199
    executor.pool.clear([0])


def test_ranks_fill_one_pool_as_one_rank_does(model: Model, ranks: Ranks) -> None:
    """Block for block, so that KV can be handed over between workers of any degrees."""
    kv = []
    one = load_executor(model("qwen3").path, **OPTIONS)
    for executor in (one, ranks("qwen3", 2, 2)):
        driver = Driver(executor, budget=16)
        sequence = driver.add(range(3, 20), 2)
        driver.step()
        driver.step()
        kv.append(executor.pool.storage[sequence.blocks].clone())
        driver.run()
    one.close()
    assert kv[0].abs().sum() > 0
    torch.testing.assert_close(kv[1], kv[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 3}, "--tensor-parallel 3: does not divide the model's 8 heads"),
        ({"pipeline_parallel": 4}, "--pipeline-parallel 4: the model has 3 layers"),
        ({"tensor_parallel": 2, "quantization": "int8"}, "with --quantization only"),
        ({"tensor_parallel": 2, "attention_backend": "native"}, "native"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    model: Model, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_executor(model("qwen2").path, **OPTIONS | options)


# -- Losses ------------------------------------------------------------------------------------


def _one_pass(executor: TorchExecutor) -> None:
    driver = Driver(executor, budget=16)
    driver.add([5, 6, 7], 1)
    driver.step()


def test_a_rank_that_dies_breaks_the_executor_and_takes_the_others_along(model: Model) -> None:
    before = children()
    executor = load_executor(model("qwen3").path, tensor_parallel=2, pipeline_parallel=2, **OPTIONS)
    mine = children() - before
    assert len(mine) == 3
    _one_pass(executor)
    os.kill(max(mine), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(ExecutorBroken, match=r"rank \d ended with"):
        _one_pass(executor)
    executor.close()
    assert time.monotonic() - started < 30
    assert not children() & mine


def test_a_rank_that_hangs_breaks_the_executor(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.parallel.load, "PATIENCE", 2.0)
    before = children()
    executor = load_executor(model("llama").path, tensor_parallel=2, **OPTIONS)
    (other,) = children() - before
    os.kill(other, signal.SIGSTOP)
    with pytest.raises(ExecutorBroken, match="do not answer"):
        _one_pass(executor)
    os.kill(other, signal.SIGKILL)  # a stopped process would take the whole grace time
    executor.close()


def test_the_wait_for_an_output_ends_with_it_or_when_it_is_interrupted(model: Model) -> None:
    before = children()
    executor = load_executor(model("llama").path, pipeline_parallel=2, **OPTIONS)
    assert isinstance(executor, Pipeline)
    (other,) = children() - before
    driver = Driver(executor, budget=16)
    plans = [StepPlan((driver._chunk(driver.add([5, 6, 7 + i], 1), 3),)) for i in range(2)]
    os.kill(other, signal.SIGSTOP)
    handle = executor.submit(plans[0])
    threading.Timer(0.05, executor.interrupt).start()
    assert not executor.ready(handle)
    executor.interrupt()  # before it waits
    assert not executor.ready(handle)
    second = executor.submit(plans[1])
    os.kill(other, signal.SIGCONT)
    for begun in (handle, second):
        assert executor.ready(begun)
        assert None not in executor.result(begun).sampled
    handle = executor.submit(plans[0])
    os.kill(other, signal.SIGKILL)
    with pytest.raises(ExecutorBroken):
        executor.ready(handle)
        executor.result(handle)
    executor.close()
    executor.interrupt()  # by somebody who does not know that


def _serve(path: Path, options: dict[str, Any], pids: Any) -> None:
    executor = load_executor(path, tensor_parallel=2, **options)
    pids.send(sorted(children()))
    signal.pause()
    executor.close()


def test_ranks_end_with_a_worker_that_is_killed(model: Model) -> None:
    processes = multiprocessing.get_context("forkserver")
    ours, theirs = processes.Pipe()
    arguments = (model("llama").path, OPTIONS, theirs)
    worker = processes.Process(target=_serve, args=arguments)
    worker.start()
    (pid,) = ours.recv()
    assert _alive(pid)
    worker.kill()
    worker.join()
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    """Whether there is such a process that is not just waiting to be forgotten."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_plan_of_many_sequences_fits_the_line_to_the_ranks(ranks: Ranks) -> None:
    """More than a socket's buffer holds."""
    executor = ranks("llama", 2, 1)
    driver = Driver(executor, budget=16)
    sequence = driver.add([5] * 8, 1)
    sequence.blocks = [0] * 20_000
    plan = StepPlan((Chunk(sequence, 159_992, 8, sample=False),))
    sequence.tokens = [5] * 160_000
    executor.execute(plan)
    executor.pool.clear([0])


_TOUCHES = """
import importlib, sys, torch
touched = []
for name in ("is_available", "device_count", "_lazy_init"):
    setattr(torch.cuda, name, lambda *_, name=name: touched.append(name))
for module in sys.argv[1:]:
    importlib.import_module(module)
sys.exit(str(touched) if touched else 0)
"""


def test_what_ranks_are_forked_from_leaves_cuda_alone() -> None:
    """A driver that was looked at before a fork is of no use behind it."""
    modules = ("engine.parallel.rank", "engine.gpu.model", "engine.model.llama")
    found = subprocess.run(
        [sys.executable, "-c", _TOUCHES, *modules], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
