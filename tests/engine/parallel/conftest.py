"""Tiny models that can be divided, and executors over several ranks, which start slowly: one of
each kind for the whole run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from engine.load import load_executor
from engine.model.runner import TorchExecutor
from tests.engine.conftest import TinyModel, save_model

_SIZES: dict[str, Any] = {
    "vocab_size": 199,  # no multiple of anything
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# For Triton's interpreter, which is slow.
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(
        **_SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=13),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES | {"num_key_value_heads": 4}),
    "small-llama": lambda: LlamaConfig(
        **_SIZES | _SMALL | {"num_key_value_heads": 1},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "small-mistral": lambda: MistralConfig(**_SIZES | _SMALL, sliding_window=5),
    "small-qwen3": lambda: Qwen3Config(**_SIZES | _SMALL),
}
OPTIONS: dict[str, Any] = {
    "attention_backend": "torch",
    "block_size": 8,
    "kv_memory": 2**20,
    "max_batch_tokens": 16,
    "threads": 1,
}
TRITON = {"attention_backend": "triton", "block_size": 4, "max_batch_sequences": 4}
SWAPPING = TRITON | {"host_kv_memory": 2**18}


def children() -> set[int]:
    """Ranks that this process has started, by process id."""
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    """The tiny model of a name; made once."""
    made: dict[str, TinyModel] = {}

    def make(name: str) -> TinyModel:
        if name not in made:
            made[name] = save_model(_CONFIGS[name](), tmp_path_factory.mktemp(name))
        return made[name]

    return make


@pytest.fixture(scope="session")
def ranks(model: Callable[[str], TinyModel]) -> Iterator[Callable[..., TorchExecutor]]:
    """`ranks(name, tensor, pipeline)`: an executor, made once and used by one test after the
    other."""
    made: dict[tuple[object, ...], TorchExecutor] = {}

    def make(name: str, tensor: int, pipeline: int, **options: Any) -> TorchExecutor:
        key = (name, tensor, pipeline, *options.items())
        if key not in made:
            made[key] = load_executor(
                model(name).path,
                tensor_parallel=tensor,
                pipeline_parallel=pipeline,
                **OPTIONS | options,
            )
        return made[key]

    yield make
    for executor in made.values():
        executor.close()


@pytest.fixture
def one(model: Callable[[str], TinyModel]) -> Iterator[Callable[..., TorchExecutor]]:
    """`one(name)`: an executor of a single process, in torch, closed at the end."""
    made: list[TorchExecutor] = []

    def make(name: str, **options: Any) -> TorchExecutor:
        made.append(load_executor(model(name).path, **OPTIONS | {"block_size": 4} | options))
        return made[-1]

    yield make
    for executor in made:
        executor.close()
