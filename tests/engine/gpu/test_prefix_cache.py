"""Prefixes that are reused where passes begin before they are planned, in every format of KV."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from engine.gpu.executor import GpuExecutor
from engine.load import load_executor
from scheduling.rules import Rules
from tests.engine.conftest import one_layer
from tests.engine.test_prefix_cache import ROUNDING, Chats

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def small(save: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that the interpreter gets through."""
    return save(one_layer(67), tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize(
    ("kv", "blocks", "answer"),
    [("float32", 12, 6), ("int8", 40, 3), ("fp8", 40, 3)],  # 12 blocks are short for all of them
)
def test_conversations_get_transformers_tokens(
    kv: str, blocks: int, answer: int, small: Any, device: Any
) -> None:
    executor = load_executor(
        small.path,
        attention_backend="triton",
        device=str(device),
        dtype="float32",
        kv_dtype="auto" if kv == "float32" else kv,
        block_size=4,
        kv_blocks=blocks,
        max_batch_tokens=32,
        max_batch_sequences=4,
    )
    assert isinstance(executor, GpuExecutor)
    try:
        chats = Chats(executor, Rules(ahead=True), "fcfs", cache=True)
        chats.answer = answer
        chats.talk(small, ROUNDING[kv], chats=2, turns=2)
    finally:
        executor.close()
    assert chats.scheduler.prefixes.found > 12
    assert executor.taken > 0
    assert (chats.scheduler.preemptions > 0) == (blocks == 12)
