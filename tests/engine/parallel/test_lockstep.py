"""Shards that run the same launches: what rank 0 begins ahead of a plan, all of them do."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from baton.types import Sampling
from engine.executor import ExecutorBroken
from engine.gpu.graphs import DecodeRows
from engine.load import load_executor
from engine.model.runner import TorchExecutor
from engine.parallel.leading import LeadingExecutor
from engine.parallel.lockstep import pack_rows, unpack_rows
from tests.engine.conftest import Driver, TinyModel
from tests.engine.parallel.conftest import OPTIONS, SWAPPING, children

Ranks = Callable[..., TorchExecutor]
Model = Callable[[str], TinyModel]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted")


@pytest.fixture
def shards(ranks: Ranks) -> LeadingExecutor:
    """Two of them, used by one test after the other."""
    executor = ranks("small-llama", 2, 1, **SWAPPING)
    assert isinstance(executor, LeadingExecutor)
    executor.taken = executor.wasted = 0
    return executor


def test_a_pass_that_is_begun_before_it_is_planned_is_begun_on_all_ranks(
    model: Model, shards: LeadingExecutor
) -> None:
    driver = Driver(shards, budget=16)
    prompts = [[5, 6, 7, 8, 9], [100, 101], [3]]
    sequences = [driver.add(prompt, 3) for prompt in prompts]
    for sequence in sequences:  # room for the next tokens: else nothing is foreseen
        sequence.blocks = [driver.free.pop(), driver.free.pop()]
    driver.run()
    for prompt, sequence in zip(prompts, sequences, strict=True):
        model("small-llama").assert_generates(prompt, sequence.tokens[len(prompt) :])
    assert shards.taken == 2 * 3  # all but the first tokens
    assert shards.wasted == 0


def test_a_guess_for_a_sequence_that_has_gone_harms_nobody(
    model: Model, shards: LeadingExecutor
) -> None:
    driver = Driver(shards, budget=16)
    gone, stays = driver.add([5, 6, 7, 8, 9], 20), driver.add([60, 61], 5)
    driver.step()
    driver.step()
    driver.running.remove(gone)  # aborted, and its blocks are somebody else's at once
    driver.free += gone.blocks
    heir = driver.add([20, 21, 22, 23, 24, 25], 3)
    driver.run()
    assert shards.wasted >= 1
    model("small-llama").assert_generates([60, 61], stays.tokens[2:])
    model("small-llama").assert_generates([20, 21, 22, 23, 24, 25], heir.tokens[6:])


def test_tokens_are_drawn_as_on_one_rank(shards: LeadingExecutor, one: Ranks) -> None:
    samplings = [
        Sampling(temperature=1.3, seed=3),
        Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=4),
        Sampling(repetition_penalty=1.5),
        Sampling(),
    ]

    def outputs(executor: TorchExecutor) -> list[list[int]]:
        driver = Driver(executor, budget=16)
        sequences = [
            driver.add([9, 8, 7, i], 3, sampling=sampling) for i, sampling in enumerate(samplings)
        ]
        driver.run()
        return [sequence.tokens for sequence in sequences]

    assert outputs(shards) == outputs(one("small-llama"))


def test_logprobs_are_those_of_one_rank(shards: LeadingExecutor, one: Ranks) -> None:
    def told(executor: TorchExecutor) -> torch.Tensor:
        driver = Driver(executor, budget=16)
        driver.add([4, 5, 6, 7], 2, logprobs=3, prompt_logprobs=2)
        driver.run()
        return torch.tensor(driver.logprobs())

    torch.testing.assert_close(told(shards), told(one("small-llama")), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("ids", [None, np.array([7, 8, 9])])
def test_a_generation_pass_comes_out_as_it_went_in(ids: Any) -> None:
    tables = np.array([[4, 2], [9, 9], [1, 3]], np.int32)
    rows = DecodeRows.at(np.array([5, 0, 4]), tables, 4)
    assert rows.slots.tolist() == [2 * 4 + 1, 9 * 4, 3 * 4]
    assert rows.begun(4) == [9, 3]
    assert rows.begun(1) == []
    found, tokens = unpack_rows(pack_rows(rows, ids), 4)
    for name in ("positions", "slots", "tables"):
        assert getattr(found, name).tolist() == getattr(rows, name).tolist()
    assert (tokens is None) if ids is None else tokens.tolist() == ids.tolist()


def test_a_shard_that_dies_breaks_the_executor(model: Model) -> None:
    before = children()
    executor = load_executor(model("small-llama").path, tensor_parallel=2, **OPTIONS | SWAPPING)
    (rank,) = children() - before
    driver = Driver(executor, budget=16)
    driver.add([5, 6, 7], 4)
    assert driver.step()
    os.kill(rank, signal.SIGKILL)
    with pytest.raises(ExecutorBroken, match="rank 1 ended with"):
        driver.run()
    executor.close()
