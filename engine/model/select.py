"""Which code runs an architecture: ours, or transformers' through its attention interface."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from engine.attention.contract import AttentionBackend
from engine.model.config import ModelConfig
from engine.model.model import PagedModel
from engine.model.weights import Checkpoint

_NATIVE = {
    "LlamaForCausalLM": "engine.model.llama:Llama",
    "MistralForCausalLM": "engine.model.llama:Llama",
    "Qwen2ForCausalLM": "engine.model.llama:Llama",
    "Qwen3ForCausalLM": "engine.model.llama:Llama",
    "OPTForCausalLM": "engine.model.opt:Opt",
}


def build_model(
    config: ModelConfig,
    dtype: torch.dtype | None,
    device: torch.device | str,
    attention: AttentionBackend,
) -> tuple[PagedModel, torch.dtype]:
    """The model with its weights, and the dtype it runs in (the checkpoint's own if None).

    Raises ModelError if the directory cannot be served.
    """
    checkpoint = Checkpoint(config.path, dtype or config.dtype, device)
    native = _NATIVE.get(config.architecture)
    if native is None:
        from engine.model.hf import load_fallback

        model = load_fallback(config.path, config, checkpoint.dtype, device, attention)
        return model, checkpoint.dtype
    module, _, name = native.partition(":")
    build: Callable[..., PagedModel] = getattr(importlib.import_module(module), name)
    return build(config, checkpoint, attention), checkpoint.dtype
