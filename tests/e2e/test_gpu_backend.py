"""Workers that run Triton kernels, through gRPC: in the interpreter where there is no GPU."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from triton.runtime.interpreter import GridExecutor

from tests.e2e.conftest import name_every_token
from tests.engine.conftest import VOCAB, TinyModel, one_layer, save_model

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model that the interpreter gets through."""
    model = save_model(one_layer(VOCAB), tmp_path_factory.mktemp("small"))
    name_every_token(Path(model.path))
    return model


@pytest.fixture(autouse=True)
def one_kernel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps its state in a global; both workers are in this process."""
    launch, lock = GridExecutor.__call__, threading.RLock()

    def launch_alone(self: Any, *arguments: Any, **options: Any) -> Any:
        with lock:
            return launch(self, *arguments, **options)

    monkeypatch.setattr(GridExecutor, "__call__", launch_alone)


async def test_kv_is_handed_over_through_host_memory_and_generation_goes_on(
    run_stack: Run,
    small: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("engine.host_blocks._on_host", lambda pool: False)  # as on a GPU
    settings = {"dtype": "float32", "attention_backend": "triton", "block_size": 4}
    batch = {"max_batch_tokens": 16, "max_batch_sequences": 2, "kv_blocks": 64}
    prompts = [[5, 9, 70, 33, 12, 60, 8, 101, 44], [7, 19, 23, 150]]
    async with run_stack(small.path, **settings, **batch) as stack, stack.client() as client:
        answers = await asyncio.gather(
            *(client.generate_unary(prompt, max_tokens=6, ignore_eos=True) for prompt in prompts)
        )
        await stack.quiet()
    assert "is recomputed" not in caplog.text
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [int(token) for token in answer.text.split()]
        assert len(tokens) == 6
        small.assert_generates(prompt, tokens)
