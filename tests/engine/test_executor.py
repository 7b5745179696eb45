"""The executor as workers use it: hand-off, forks, mixed requests, threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.shared_cores import Place, SharedCores
from baton.types import Request, Sampling, Stopping
from engine.executor import Executor
from engine.load import load_executor
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence
from tests.engine.conftest import COMPILED, on_backends


def prompt(length: int, seed: int = 1) -> list[int]:
    """A random prompt."""
    chooser = random.Random(seed)
    return [chooser.randrange(3, 199) for _ in range(length)]


ON_TORCH = {"attention_backend": "torch"}
COMPILED_HERE = {"attention_backend": "native"}


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen3", "opt", "rope-dynamic"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(ON_TORCH, ON_TORCH, id="torch-torch"),
        pytest.param(ON_TORCH, COMPILED_HERE, id="torch-native", marks=COMPILED),
        pytest.param(COMPILED_HERE, ON_TORCH, id="native-torch", marks=COMPILED),
        pytest.param(COMPILED_HERE, COMPILED_HERE, id="native-native", marks=COMPILED),
    ],
)
def test_a_sequence_goes_on_in_another_executor_from_the_bytes_of_its_blocks(
    name: str,
    before: dict[str, str],
    after: dict[str, str],
    tiny: Callable[..., Any],
    drive: Callable[..., Any],
) -> None:
    if name == "opt" and COMPILED_HERE in (before, after):
        pytest.skip("the compiled backend runs the Llama family")
    model, text = tiny(name), prompt(37)
    prefill = drive(model.path, budget=10, **before)
    decode = drive(model.path, kv_blocks=9, **after)
    assert prefill.executor.pool.geometry == decode.executor.pool.geometry
    first = prefill.add(text, 2)
    while not first.generated:
        prefill.step()
    second = decode.add(text, 15)
    second.blocks = [decode.free.pop() for _ in first.blocks]
    for source, target in zip(first.blocks, second.blocks, strict=True):
        decode.executor.pool.block(target)[:] = prefill.executor.pool.block(source)
    second.computed = len(text)
    second.append(first.tokens[-1])
    decode.run()
    model.assert_generates(text, second.tokens[len(text) :])


def test_forks_share_the_full_blocks_of_the_prompt(
    tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    model, text = tiny("llama"), prompt(37)
    driver = drive(model.path)
    parent = driver.add(text, 12)
    driver.step()
    shared = parent.blocks[: (len(text) - 1) // 16]
    forks = [driver.add(text, 12) for _ in range(2)]
    for fork in forks:
        fork.blocks, fork.computed = list(shared), 16 * len(shared)
    before = driver.executor.pool.storage[shared].clone()
    driver.run()
    assert torch.equal(driver.executor.pool.storage[shared], before)
    for sequence in (parent, *forks):
        model.assert_generates(text, sequence.tokens[len(text) :])


@pytest.mark.parametrize(("name", "backend"), on_backends("llama"))
def test_seeded_sampling_does_not_depend_on_the_batch_around_it(
    name: str, backend: str, tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    path, sampling = tiny(name).path, Sampling(temperature=1.0, seed=42)

    def sampled(budget: int, others: int) -> list[int]:
        driver = drive(path, budget=budget, attention_backend=backend)
        for index in range(others):
            driver.add(prompt(5 + index, seed=index), 20)
        sequence = driver.add(prompt(20), 20, sampling=sampling)
        driver.run()
        return list(sequence.tokens[20:])

    alone = sampled(512, 0)
    assert len(set(alone)) > 10
    assert sampled(512, 6) == alone
    assert sampled(9, 3) == alone


def test_a_repetition_penalty_sees_prompt_and_output(
    tiny: Callable[..., Any], drive: Callable[..., Any]
) -> None:
    model, text = tiny("llama"), prompt(12)
    driver = drive(model.path)
    sequence = driver.add(text, 16, sampling=Sampling(repetition_penalty=1.8))
    driver.add(text, 16)
    driver.run()
    expected = model.reference.generate(
        torch.tensor([text]),
        attention_mask=torch.ones(1, len(text), dtype=torch.int64),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=1.8,
    )
    assert sequence.tokens == expected[0].tolist()


def test_an_empty_plan_gives_an_empty_result(tiny: Callable[..., Any]) -> None:
    executor: Executor = load_executor(tiny("llama").path, threads=1)
    result = executor.execute(StepPlan(()))
    assert (result.sampled, result.prompt_logprobs) == ((), ())


def test_a_pass_leaves_its_sequences_alone_and_takes_time(tiny: Callable[..., Any]) -> None:
    executor = load_executor(tiny("llama").path, threads=1, kv_blocks=2)
    request = Request("r", tuple(prompt(20)), Sampling(), Stopping(5))
    sequence = Sequence.start(request, 0, now=0.0)
    sequence.blocks = [1, 0]
    result = executor.execute(StepPlan((Chunk(sequence, 0, 20, sample=True),)))
    assert (sequence.tokens, sequence.computed, sequence.blocks) == (prompt(20), 0, [1, 0])
    assert result.seconds > 0


def test_warm_up_fits_into_the_smallest_pool(tiny: Callable[..., Any]) -> None:
    executor = load_executor(tiny("llama").path, threads=1, kv_blocks=1, max_batch_sequences=8)
    executor.warm_up()
    assert not executor.pool.storage.any()


@pytest.mark.parametrize(
    ("backend", "threads"), [("torch", 2), pytest.param("native", 1, marks=COMPILED)]
)
def test_every_thread_that_executes_gets_the_torch_threads_of_its_backend(
    backend: str, threads: int, tiny: Callable[..., Any]
) -> None:
    executor = load_executor(tiny("llama").path, threads=2, attention_backend=backend)
    seen: list[int] = []

    def work() -> None:
        torch.set_num_threads(3)
        executor.warm_up()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.set_num_threads(1)
    assert seen == [threads]


@COMPILED
def test_passes_compute_on_the_cores_that_are_lent_and_give_the_same_tokens(
    tiny: Callable[..., Any],
    drive: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, text = tiny("llama"), prompt(37)
    driver = drive(model.path, threads=3, **COMPILED_HERE)
    cores, used = SharedCores(Place(tmp_path / "cores", 0, 1, 3)), []
    offers = iter([1, 3, 2] * 20)
    monkeypatch.setattr(cores, "take", lambda: used.append(next(offers)) or used[-1])
    use = driver.executor.model.use_threads
    told: list[int] = []
    monkeypatch.setattr(
        driver.executor.model, "use_threads", lambda count: told.append(count) or use(count)
    )
    driver.executor.share_cores(cores)
    sequence = driver.add(text, 15)
    driver.run()
    assert told == used and set(told) == {1, 2, 3}
    model.assert_generates(text, sequence.tokens[len(text) :])


def test_a_model_that_cannot_change_its_threads_stays_on_the_workers_own_cores(
    tiny: Callable[..., Any], drive: Callable[..., Any], tmp_path: Path
) -> None:
    driver = drive(tiny("llama").path, threads=3, **ON_TORCH)
    driver.executor.share_cores(SharedCores(Place(tmp_path / "cores", 1, 1, 3)))
    before = torch.get_num_threads()
    try:
        driver.add(prompt(10), 2)
        driver.step()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
