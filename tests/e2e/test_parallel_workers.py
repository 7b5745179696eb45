"""Workers of several ranks, through gRPC: KV is handed over between any degrees of parallelism."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.e2e.answers import Answer, ask
from tests.e2e.conftest import name_every_token
from tests.e2e.test_gpu_backend import one_kernel_at_a_time
from tests.engine.conftest import VOCAB, TinyModel, save_model

__all__ = ["one_kernel_at_a_time"]

Run = Callable[..., Any]

PROMPTS = ([5, 9, 70, 33, 12, 60, 8, 101, 44], [7, 19, 23, 150])


@pytest.fixture(scope="module")
def divisible(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model of two layers with two key heads, that the interpreter gets through."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = save_model(config, tmp_path_factory.mktemp("divisible"))
    name_every_token(Path(model.path))
    return model


@pytest.mark.parametrize(
    ("backend", "prefill", "decode"),
    [
        ("torch", (2, 1), (1, 2)),  # one pool for all ranks of a worker
        ("triton", (2, 1), (1, 1)),  # a pool of its own for each
        ("triton", (1, 1), (2, 1)),
        ("triton", (1, 2), (1, 2)),
    ],
)
async def test_workers_of_any_degrees_hand_over_and_go_on(
    run_stack: Run,
    divisible: TinyModel,
    caplog: pytest.LogCaptureFixture,
    backend: str,
    prefill: tuple[int, int],
    decode: tuple[int, int],
) -> None:
    def degrees(tensor: int, pipeline: int) -> dict[str, int]:
        return {"tensor_parallel": tensor, "pipeline_parallel": pipeline}

    settings = {"dtype": "float32", "attention_backend": backend, "block_size": 4}
    batch = {"max_batch_tokens": 16, "max_batch_sequences": 2, "kv_blocks": 64}
    stack = run_stack(
        divisible.path,
        decode_settings=degrees(*decode),
        **degrees(*prefill),
        **settings,
        **batch,
    )
    async with stack as running, running.client() as client:

        async def answers() -> list[Answer]:
            asked = (ask(client, prompt, max_tokens=5) for prompt in PROMPTS)
            return list(await asyncio.gather(*asked))

        first, again = await answers(), await answers()  # then with the KV of prefixes
        await running.quiet()
    assert "is recomputed" not in caplog.text
    assert again[0].usage.cached_tokens == 8
    for prompt, answer in zip(PROMPTS * 2, first + again, strict=True):
        assert len(answer.ids[0]) == 5
        divisible.assert_generates(prompt, answer.ids[0])
