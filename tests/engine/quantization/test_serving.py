"""A quantized model is served as the dense model that its weights mean, on every backend."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import demo_model
from baton.errors import ModelError
from engine.model.load import load_executor
from engine.model.weights import Checkpoint, fingerprint
from engine.native.library import load

COMPILED = pytest.mark.skipif(load() is None, reason="the compiled backend was not built here")
PROMPT = [1, 300, 1200, 77, 2048, 31, 9, 560]


def dequantized(quantized: Path, target: Path) -> Path:
    """The demo model with the weights that a quantized copy of it has, in float32."""
    shutil.copytree(demo_model.path(), target)
    checkpoint = Checkpoint(quantized, torch.float32)
    tensors = load_file(target / "model.safetensors")
    dense = {name: checkpoint(name, *tensor.shape) for name, tensor in tensors.items()}
    save_file(dense, target / "model.safetensors", metadata={"format": "pt"})
    return target


def generated(
    drive: Callable[..., Any], path: Path, backend: str
) -> tuple[str, tuple[list[int], list[float]]]:
    """What the weights are called; greedy tokens, and what they were worth."""
    driver = drive(path, attention_backend=backend, dtype="float32", kv_memory=2**21)
    sequence = driver.add(PROMPT, 6, logprobs=0)
    driver.run()
    found = [one.logprob.logprob for _, result in driver.results for one in result.sampled if one]
    return driver.executor.weight_dtype, (sequence.tokens[len(PROMPT) :], found)


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
    dense = dequantized(quantized, tmp_path / "dense")
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


def test_a_family_that_transformers_runs_is_not_served_quantized(
    quantize_model: Callable[[Path, Path, str], Path], tmp_path: Path
) -> None:
    path = quantize_model(demo_model.path(), tmp_path / "model", "gptq")
    file = path / "config.json"
    changes = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError, match="GemmaForCausalLM has no implementation here that reads"):
        load_executor(path)
