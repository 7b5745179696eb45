"""Ranks of a model whose weights are stored quantized: each has its part of what one has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from baton.errors import ModelError
from engine.load import load_executor
from engine.model.weights import Checkpoint
from engine.parallel.shard import ShardedCheckpoint
from engine.parallel.topology import Topology
from tests.engine.conftest import Driver, TinyModel
from tests.engine.parallel.conftest import OPTIONS
from tests.engine.quantization.conftest import FORMATS, quantized_copy

Model = Callable[[str], TinyModel]
Quantized = Callable[..., Path]

HIDDEN, INTERMEDIATE, HEADS, KEYS = 48, 96, 128, 32
# Which axis is divided, and the shape of the whole; two key heads of 16.
PROJECTIONS = {
    "self_attn.q_proj": (0, HEADS, HIDDEN),
    "self_attn.k_proj": (0, KEYS, HIDDEN),
    "self_attn.o_proj": (1, HIDDEN, HEADS),
    "mlp.up_proj": (0, INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (1, HIDDEN, INTERMEDIATE),
}
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [3])


@pytest.fixture(scope="module")
def quantized(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Quantized:
    """A tiny model in a format of FORMATS; made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, source: str = "qwen2") -> Path:
        if (name, source) not in made:
            target = tmp_path_factory.mktemp("quantized") / name
            made[name, source] = quantized_copy(model(source).path, target, name)
        return made[name, source]

    return make


@pytest.mark.parametrize("shards", [2, 4])
@pytest.mark.parametrize("name", list(FORMATS))
def test_a_shard_of_a_quantized_weight_is_that_of_the_dense_one(
    quantized: Quantized, name: str, shards: int
) -> None:
    whole = Checkpoint(quantized(name), torch.float32)
    ranks = [
        ShardedCheckpoint(quantized(name), torch.float32, "cpu", Topology(shards, 1, rank))
        for rank in range(shards)
    ]
    for projection, (axis, *shape) in PROJECTIONS.items():
        weight = f"model.layers.1.{projection}.weight"
        pieces = min(shards, 2) if "k_proj" in projection else shards
        dense = whole(weight, *shape).chunk(pieces, axis)
        for rank, checkpoint in enumerate(ranks):
            expected = dense[rank * pieces // shards]
            out, into = expected.shape
            assert torch.equal(checkpoint(weight, out, into), expected)
            stored = checkpoint.quantized(weight, out, into)
            if stored is not None:
                assert torch.equal(stored.dequantize(), expected)
            else:  # a block of 16 inputs cut into eights
                assert (name, projection, shards) == ("fp8-blocks", "mlp.down_proj", 4)


def test_a_quantized_head_is_divided_as_a_vocabulary(quantized: Quantized, tmp_path: Path) -> None:
    config, store, _ = FORMATS["gptq"]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    dense = Checkpoint(quantized("gptq"), torch.float32)("lm_head.weight", 199, HIDDEN)
    stored = {f"lm_head.{name}": tensor for name, tensor in store(dense).items()}
    save_file(stored, tmp_path / "model.safetensors")
    head = Checkpoint(tmp_path, torch.float32)("lm_head.weight", 199, HIDDEN)
    assert 0 < (head - dense).norm() < 0.1 * dense.norm()
    rows = [
        ShardedCheckpoint(tmp_path, torch.float32, "cpu", Topology(5, 1, rank))(
            "lm_head.weight", 50, HIDDEN
        )
        for rank in range(5)
    ]
    assert torch.equal(torch.cat(rows)[:199], head)
    assert not torch.cat(rows)[199:].any()


def test_a_quantized_weight_of_another_size_is_no_shard(quantized: Quantized) -> None:
    shard = ShardedCheckpoint(quantized("gptq"), torch.float32, "cpu", Topology(2, 1, 1))
    name = "model.layers.0.mlp.down_proj.weight"
    for read in (shard, shard.quantized):
        with pytest.raises(ModelError, match=f"'{name}' has shape .48, 96., of which .* no shard"):
            read(name, HIDDEN, 32)


def _generate(path: Path, tokens: int = 6, **options: Any) -> tuple[str, list[list[int]]]:
    """What the weights are called, and tokens."""
    executor = load_executor(path, **OPTIONS | options)
    try:
        driver = Driver(executor, budget=16)
        sequences = [driver.add(prompt, tokens) for prompt in PROMPTS]
        driver.run()
        return executor.weight_dtype, [sequence.tokens for sequence in sequences]
    finally:
        executor.close()


@pytest.mark.parametrize(
    ("name", "tensor", "pipeline"),
    [("gptq-act-order", 2, 1), ("awq", 4, 1), ("fp8-blocks", 2, 2)],
)
def test_ranks_of_a_quantized_model_generate_what_one_does(
    quantized: Quantized, name: str, tensor: int, pipeline: int
) -> None:
    shown, expected = _generate(quantized(name))
    assert shown == f"float32 from {FORMATS[name][2]}"
    ranks = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
    assert _generate(quantized(name), **ranks) == (shown, expected)


@pytest.mark.parametrize("name", ["gptq-act-order", "compressed-int8", "fp8-blocks"])
def test_ranks_that_multiply_by_stored_weights_generate_what_dense_ones_do(
    quantized: Quantized, name: str
) -> None:
    path = quantized(name, "small-qwen3")
    triton = {"attention_backend": "triton", "block_size": 4, "max_batch_sequences": 4}
    expected = _generate(path, 2)
    assert _generate(path, 2, tensor_parallel=2, **triton) == expected
