"""Workers that run Triton kernels, through gRPC: in the interpreter where there is no GPU."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from engine.gpu.staging import Staging
from tests.cluster import Served
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


@dataclass
class HandOff:
    """What happened on the way."""

    saved: int = 0  # blocks
    loaded: int = 0


@pytest.fixture
def hand_off(monkeypatch: pytest.MonkeyPatch) -> HandOff:
    """The hand-off of workers whose pools count as a device's."""
    monkeypatch.setattr("engine.host_blocks._on_host", lambda pool: False)
    seen, save, load = HandOff(), Staging.save, Staging.load

    def saved(self: Any, blocks: Any, **options: Any) -> None:
        seen.saved += len(blocks)
        save(self, blocks, **options)

    def loaded(self: Any, blocks: Any) -> None:
        seen.loaded += len(blocks)
        load(self, blocks)

    monkeypatch.setattr(Staging, "save", saved)
    monkeypatch.setattr(Staging, "load", loaded)
    return seen


@pytest.mark.parametrize(
    ("transport", "kv_dtype"), [("cuda_ipc", "auto"), ("cuda_ipc", "int8"), ("shm", "auto")]
)
async def test_kv_is_handed_over_and_generation_goes_on(
    run_stack: Run,
    small: TinyModel,
    hand_off: HandOff,
    transport: str,
    kv_dtype: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"dtype": "float32", "attention_backend": "triton", "block_size": 4}
    settings |= {"kv_dtype": kv_dtype, "decode_settings": {"kv_transports": transport}}
    batch = {"max_batch_tokens": 16, "max_batch_sequences": 2, "kv_blocks": 64}
    prompts = [[5, 9, 70, 33, 12, 60, 8, 101, 44], [7, 19, 23, 150]]
    async with run_stack(small.path, **settings, **batch) as stack, stack.client() as client:
        answers = await asyncio.gather(
            *(client.generate_unary(prompt, max_tokens=6, ignore_eos=True) for prompt in prompts)
        )
        await stack.quiet()
        assert stack.decoded("kv_pulled_bytes_total", transport=transport) > 0
    assert "is recomputed" not in caplog.text
    through_host = hand_off.saved > 0, hand_off.loaded > 0
    assert through_host == ((False, False) if transport == "cuda_ipc" else (True, True))
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = [int(token) for token in answer.text.split()]
        assert len(tokens) == 6
        if kv_dtype == "auto":
            small.assert_generates(prompt, tokens)


@pytest.mark.parametrize(("transport", "saved"), [("cuda_ipc", [0, 0]), ("shm", [3, 2])])
async def test_of_a_prefix_that_is_there_nothing_is_handed_over_again(
    run_stack: Run, small: TinyModel, hand_off: HandOff, transport: str, saved: list[int]
) -> None:
    settings = {"dtype": "float32", "attention_backend": "triton", "block_size": 4}
    settings |= {"kv_blocks": 64, "decode_settings": {"kv_transports": transport}}
    settings |= {"gateway_settings": {"local_prefill_tokens": 0}}
    first = [5, 9, 70, 33, 12, 60, 8, 101, 44]  # two blocks, and one token
    second = [*first[:8], 61, 62, 63, 64, 65]  # two more blocks
    found, pulled = [], []
    async with run_stack(small.path, **settings) as stack, stack.client() as client:
        for prompt in (first, second):
            before = hand_off.saved, stack.decoded("kv_pulled_bytes_total", transport=transport)
            answer = await client.generate_unary(prompt, max_tokens=4, ignore_eos=True)
            await stack.quiet()
            small.assert_generates(prompt, [int(token) for token in answer.text.split()])
            found.append(hand_off.saved - before[0])
            pulled.append(stack.decoded("kv_pulled_bytes_total", transport=transport) - before[1])
    assert found == saved
    assert pulled[0] * 2 == pulled[1] * 3  # three blocks, then two


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_two_workers_on_one_gpu_hand_kv_over_on_it() -> None:
    served = Served("--device=cuda", "--kv-blocks=256", "--max-batch-sequences=4")
    try:
        command = [sys.executable, "-m", "launcher", "generate", "What does len do?"]
        result = subprocess.run(
            [*command, "--address", served.address], capture_output=True, text=True, timeout=120
        )
        assert (result.returncode, result.stderr) == (0, "")
        served.wait_for_log("KV comes by cuda_ipc")
        assert not any("is recomputed" in line for line in served.log)
    finally:
        served.stop()
