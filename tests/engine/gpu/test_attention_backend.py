"""Triton's attention as a backend: it writes the pool and attends, as the reference does."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Olmo2Config

from baton.errors import ConfigError
from baton.types import Request, Sampling, Stopping
from engine.attention.reference import TorchAttention
from engine.attention.select import attention_names, select_attention
from engine.gpu.attention import TritonAttention, attend
from engine.gpu.ragged import Ragged
from engine.model.batch import build_batch
from engine.model.config import read_config
from engine.model.hf import load_fallback
from engine.model.llama import Llama
from engine.model.pool import KvGeometry, KvPool
from engine.model.weights import Checkpoint
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence
from tests.engine.gpu.attention_scene import LAYER, Scene

MIXED = [(40, 1), (0, 9), (15, 1), (20, 3), (0, 1)]
FORMATS = [None, torch.int8, torch.float8_e4m3fn]
PROMPTS = [[5, 9, 70, 33, 12, 60], [7], [100, 3, 50] * 6]


@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("window", [None, 12])
def test_a_mixed_pass_is_attended_to_by_definition(
    kv_dtype: torch.dtype | None, window: int | None, device: torch.device
) -> None:
    scene = Scene(device, MIXED, kv_dtype=kv_dtype)
    found = TritonAttention(device).attend(
        LAYER, scene.q, scene.k, scene.v, scene.batch, scene.pool, scale=0.3, window=window
    )
    scene.check(found, 0.3, window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize(("dim", "kv_heads"), [(16, 2), (48, 3)])
def test_the_pool_holds_the_bytes_that_the_reference_writes(
    kv_dtype: torch.dtype | None,
    dtype: torch.dtype,
    dim: int,
    kv_heads: int,
    device: torch.device,
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "kv_dtype": kv_dtype, "dim": dim}
    options |= {"heads": kv_heads, "kv_heads": kv_heads, "block_size": 4}
    ours, theirs = (Scene(device, [(5, 1), (0, 3), (9, 2)], **options) for _ in range(2))
    for scene in (ours, theirs):
        scene.k[1, 0] *= 1e-4
        scene.k[2, 1] = 0.0
        scene.v[0, 1, 3] = torch.inf if kv_dtype else 1e30
        scene.k[3, 0, 5] = torch.nan if kv_dtype else 0.0
        scene.v[4] *= torch.logspace(-6, 2, dim, device=device).to(dtype)
    theirs.store()
    before = ours.pool.storage.clone()
    TritonAttention(device).attend(LAYER, ours.q, ours.k, ours.v, ours.batch, ours.pool, scale=0.3)
    written, wanted = (pool.storage.view(torch.uint8) for pool in (ours.pool, theirs.pool))
    assert torch.equal(written, wanted)
    assert not torch.equal(written, before.view(torch.uint8))


def test_tensors_of_transformers_have_the_tokens_of_a_head_together(device: torch.device) -> None:
    scene = Scene(device, MIXED)
    turned = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (scene.q, scene.k, scene.v))
    backend = TritonAttention(device)
    scene.check(backend.attend(LAYER, *turned, scene.batch, scene.pool, scale=0.3), 0.3)


def test_contexts_that_only_the_device_knows_are_attended_to(device: torch.device) -> None:
    scene = Scene(device, [(40, 1), (3, 1)])
    scene.store()
    contexts = torch.tensor([41, 4], dtype=torch.int32, device=device)
    ragged = Ragged.of_singles(contexts, scene.batch.block_tables.int())
    scene.check(attend(scene.q, scene.pool, LAYER, ragged, scale=0.3), 0.3)


def generated(model: Any, device: torch.device, tokens: int) -> list[list[int]]:
    """Greedy outputs: prompts and generation share passes, in blocks of 4."""

    geometry = KvGeometry.of("", model.layers, model.kv_heads, model.head_dim, torch.float32, 4)
    pool = KvPool(geometry, 40, device=device)
    live = []
    for index, prompt in enumerate(PROMPTS):
        request = Request("r", tuple(prompt), Sampling(), Stopping(tokens))
        live.append(Sequence.start(request, 0, now=0.0))
        live[-1].blocks = [(7 * (index * 10 + place) + 3) % 40 for place in range(10)]
    for turn in range(tokens + len(PROMPTS) - 1):
        begun = [s for s in live[: turn + 1] if len(s.tokens) < s.prompt_length + tokens]
        chunks = tuple(Chunk(s, s.computed, s.uncomputed, sample=True) for s in begun)
        with torch.inference_mode():
            best = model.forward(build_batch(StepPlan(chunks), 4, device)[0], pool).best
        for chunk, token in zip(chunks, best.tolist(), strict=True):
            chunk.sequence.computed += chunk.length
            chunk.sequence.append(token)
    return [sequence.tokens[sequence.prompt_length :] for sequence in live]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "llama-narrow-heads"])
def test_a_model_generates_what_it_does_with_the_reference(
    name: str, tiny: Callable[..., Any], device: torch.device
) -> None:
    config = read_config(tiny(name).path)
    checkpoint = Checkpoint(config.path, torch.float32, device)
    ours = Llama(config, checkpoint, TritonAttention(device))
    theirs = Llama(config, checkpoint, TorchAttention())
    assert generated(ours, device, 4) == generated(theirs, device, 4)


def test_models_of_transformers_generate_what_they_do_with_the_reference(
    save: Callable[..., Any], tmp_path: Any, device: torch.device
) -> None:
    sizes = {"vocab_size": 199, "hidden_size": 48, "intermediate_size": 64}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 2}
    save(Olmo2Config(**sizes, **heads, max_position_embeddings=64), tmp_path)
    config = read_config(tmp_path)
    ours, theirs = (
        load_fallback(tmp_path, config, torch.float32, device, backend)
        for backend in (TritonAttention(device), TorchAttention())
    )
    assert generated(ours, device, 3) == generated(theirs, device, 3)


def test_the_backend_is_chosen_by_name(device: torch.device) -> None:
    assert isinstance(select_attention("triton", device), TritonAttention)
    assert "triton" in attention_names()
    assert isinstance(select_attention("auto", "cpu"), TorchAttention)


def test_a_gpu_gets_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(select_attention("auto", "cuda"), TritonAttention)
    monkeypatch.setattr("engine.attention.select.find_spec", lambda _: None)
    assert isinstance(select_attention("auto", "cuda"), TorchAttention)


def test_a_device_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = importlib.import_module("engine.gpu.kernels.launch")
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    with pytest.raises(ConfigError, match="--attention-backend triton: needs a GPU"):
        select_attention("triton", "cpu")
