"""A quantized model is served as the dense model that its weights mean, on every backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

import demo_model
from baton.errors import ModelError
from engine.load import load_executor
from engine.model.weights import Checkpoint, fingerprint
from engine.native.library import load

COMPILED = pytest.mark.skipif(load() is None, reason="the compiled backend was not built here")
PROMPT = [1, 300, 1200, 77, 2048, 31, 9, 560]


def dequantized(source: Path, quantized: Path, target: Path) -> Path:
    """A model with the weights that a quantized copy of it has, in float32."""
    shutil.copytree(source, target)
    checkpoint = Checkpoint(quantized, torch.float32)
    tensors = load_file(target / "model.safetensors")
    dense = {name: checkpoint(name, *tensor.shape) for name, tensor in tensors.items()}
    save_file(dense, target / "model.safetensors", metadata={"format": "pt"})
    return target


def generated(
    drive: Callable[..., Any], path: Path, backend: str, prompt: Iterable[int] = PROMPT
) -> tuple[str, tuple[list[int], list[float]]]:
    """What the weights are called; greedy tokens, and what they were worth."""
    driver = drive(path, attention_backend=backend, dtype="float32", kv_memory=2**21)
    sequence = driver.add(prompt, 6, logprobs=0)
    driver.run()
    found = [one.logprob.logprob for _, result in driver.results for one in result.sampled if one]
    return driver.executor.weight_dtype, (sequence.tokens[sequence.prompt_length :], found)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=COMPILED)])
def test_a_quantized_model_generates_what_its_dequantized_model_does(
    backend: str,
    format_name: str,
    quantize_model: Callable[[Path, Path, str], Path],
    stored_as: Callable[[str], str],
    drive: Callable[..., Any],
    tmp_path: Path,
) -> None:
    quantized = quantize_model(demo_model.path(), tmp_path / "quantized", format_name)
    size = (quantized / "model.safetensors").stat().st_size
    assert size < 0.75 * (demo_model.path() / "model.safetensors").stat().st_size
    assert fingerprint(quantized) != fingerprint(demo_model.path())
    shown, output = generated(drive, quantized, backend)
    assert shown == f"float32 from {stored_as(format_name)}"
    dense = dequantized(demo_model.path(), quantized, tmp_path / "dense")
    assert ("float32", output) == generated(drive, dense, backend)


@pytest.mark.skipif(load() is None, reason="the compiled backend was not built here")
def test_a_checkpoint_can_be_quantized_again_at_load(
    quantize_model: Callable[[Path, Path, str], Path], tmp_path: Path
) -> None:
    quantized = quantize_model(demo_model.path(), tmp_path / "model", "gptq")
    executor = load_executor(quantized, quantization="int8", threads=1)
    assert executor.weight_dtype == "int8 from int4"


def test_gptqs_own_file_is_part_of_the_fingerprint(
    quantize_model: Callable[[Path, Path, str], Path], tmp_path: Path
) -> None:
    path = quantize_model(demo_model.path(), tmp_path / "model", "gptq")
    seen = set()
    for version in ("gptq", "gptq_v2"):
        (path / "quantize_config.json").write_text(json.dumps({"checkpoint_format": version}))
        seen.add(fingerprint(path))
    assert len(seen) == 2


_SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma3_text": _SIZES | {"sliding_window": 9},
    # Experts are stored one by one, and put together by transformers.
    "qwen3_moe": _SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


@pytest.mark.parametrize(
    ("kind", "stored"),
    [("gemma3_text", "compressed-int4"), ("gemma3_text", "fp8-blocks"), ("qwen3_moe", "gptq")],
)
def test_families_that_transformers_runs_are_served_from_dense_weights(
    kind: str,
    stored: str,
    save: Callable[..., Any],
    quantize_model: Callable[[Path, Path, str], Path],
    stored_as: Callable[[str], str],
    drive: Callable[..., Any],
    tmp_path: Path,
) -> None:
    save(AutoConfig.for_model(kind, **OTHERS[kind]), tmp_path / "plain")
    quantized = quantize_model(tmp_path / "plain", tmp_path / "quantized", stored)
    names = safe_open(quantized / "model.safetensors", framework="pt").keys()
    assert any("experts.3.up_proj.qweight" in name for name in names) == (kind == "qwen3_moe")
    dense = dequantized(tmp_path / "plain", quantized, tmp_path / "dense")
    shown, output = generated(drive, quantized, "torch", range(11, 19))
    assert shown == f"float32 from {stored_as(stored)}"
    assert ("float32", output) == generated(drive, dense, "torch", range(11, 19))


def test_a_family_with_transposed_weights_is_not_served_quantized(
    save: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = {"n_embd": 48, "n_layer": 1, "n_head": 6, "n_positions": 96, "vocab_size": 199}
    save(AutoConfig.for_model("gpt2", **sizes, bos_token_id=1, eos_token_id=2), tmp_path)
    file = tmp_path / "config.json"
    quantized = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16}}
    file.write_text(json.dumps(json.loads(file.read_text()) | quantized))
    with pytest.raises(ModelError, match="GPT2LMHeadModel has its weights transposed"):
        load_executor(tmp_path)


def test_what_a_family_does_not_have_is_refused(
    save: Callable[..., Any],
    quantize_model: Callable[[Path, Path, str], Path],
    tmp_path: Path,
) -> None:
    save(AutoConfig.for_model("gemma3_text", **OTHERS["gemma3_text"]), tmp_path / "plain")
    path = quantize_model(tmp_path / "plain", tmp_path / "quantized", "gptq")
    tensors = load_file(path / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    unused = {f"{module}.input_scale": torch.ones(1), f"{module}.bias": torch.zeros(80)}
    save_file(tensors | unused, path / "model.safetensors", metadata={"format": "pt"})
    load_executor(path, dtype="float32")
    file = path / "config.json"  # as old tools had it
    config = json.loads(file.read_text())
    (path / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    file.write_text(json.dumps(config))
    assert load_executor(path, dtype="float32").weight_dtype == "float32 from int4"
    more = {
        name.replace("up_proj", "extra_proj"): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(module)
    }
    save_file(tensors | more, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"unexpected keys: model\.layers\.0\.mlp\.extra_proj\.w"):
        load_executor(path, dtype="float32")
    bias = {f"{module}.bias": torch.ones(80)}
    save_file(tensors | bias, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"unexpected keys: model\.layers\.0\.mlp\.up_proj\.bias"):
        load_executor(path, dtype="float32")
