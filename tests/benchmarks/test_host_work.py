"""The profile of a decode worker's step accounts for all of it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

RUNNER = "engine.model.runner"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny random Llama."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    return tmp_path


async def test_every_part_of_a_real_step_is_seen(model: Path) -> None:
    host_work = importlib.import_module("benchmarks.host_work")
    options = {
        "batch": 3,
        "prompt": 8,
        "tokens": 12,
        "temperature": 1.0,
        "threads": 1,
        "dtype": "float32",
        "backend": "torch",
    }
    records = await host_work.measure(model, "tiny", options)
    assert {(r.backend, r.precision, r.batch) for r in records} == {("torch", "float32", 3)}
    assert importlib.import_module("engine.model.runner")._sample.__module__ == RUNNER
    values = {record.metric: record.value for record in records}
    assert 2 <= values["steps"] <= 11  # all but those that others of the batch were not in
    parts = [values[f"fast_{part}"] for part in host_work.PARTS]
    assert min(parts) > 0
    assert values["fast_host"] < values["fast_step"] <= values["step"]


def test_a_step_is_shared_out_among_its_parts() -> None:
    host_work = importlib.import_module("benchmarks.host_work")
    clocks = host_work.Clocks()
    clocks._now.update(
        {"plan": 1, "batch": 2, "model": 50, "sampling": 3, "execute": 60, "apply": 4, "beside": 5}
    )
    clocks._keep(seconds=75)
    step = clocks.steps[0]
    assert (step["execute"], step["between"], step["beside"]) == (60 - 55, 75 - 60 - 5, 5)
    assert sum(step[part] for part in host_work.PARTS) == step["step"] == 75
