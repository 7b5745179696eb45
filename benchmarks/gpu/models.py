"""Models of well-known shapes with random weights, made on the device: nothing is written."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config

from engine.gpu.executor import GpuExecutor
from engine.gpu.model import GpuLlama
from engine.model.config import ModelConfig
from engine.model.pool import KvGeometry, KvPool
from engine.model.weights import Checkpoint
from engine.quantization.window import Window
from scheduling.plan import Capacity
from scheduling.simulator.hardware import SHAPES as PUBLISHED

_SPREAD = 0.02  # standard deviation of weights, as models are initialized


def _published(kind: type[PretrainedConfig], name: str, **more: Any) -> PretrainedConfig:
    """The configuration of a shape that `baton plan` knows, too."""
    shape = PUBLISHED[name]
    return kind(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_context,
        **more,
    )


def _llama_3_8b() -> PretrainedConfig:
    return _published(LlamaConfig, "llama-3-8b", rms_norm_eps=1e-5)


def _mistral_7b() -> PretrainedConfig:
    return _published(MistralConfig, "mistral-7b", sliding_window=None)


def _qwen3_06b() -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )


def _tiny() -> PretrainedConfig:
    """For trying the benchmark itself."""
    return LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    )


SHAPES = {
    "llama-3-8b": _llama_3_8b,
    "mistral-7b": _mistral_7b,
    "qwen3-0.6b": _qwen3_06b,
    "tiny": _tiny,
}


class RandomCheckpoint(Checkpoint):
    """A checkpoint that has every tensor that it is asked for."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.path, self.files, self.scheme = Path("random"), [], None
        self.dtype, self.device = dtype, device
        self._chance = torch.Generator(device).manual_seed(0)

    def __contains__(self, name: str) -> bool:
        return True

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Random weights; norms are ones."""
        if len(shape) == 1 and name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        made = torch.empty(shape, dtype=self.dtype, device=self.device)
        return made.normal_(0, _SPREAD, generator=self._chance)

    def is_quantized(self, name: str) -> bool:
        """Nothing is stored in a quantized form."""
        return False

    def quantized(self, name: str, out: int, into: int, window: Window | None = None) -> None:
        """Nothing is stored in a quantized form."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a worker on the device is given."""

    blocks: int
    max_tokens: int
    max_sequences: int
    block_size: int = 16

    def capacity(self, max_context: int) -> Capacity:
        """Of a worker with these."""
        return Capacity(
            blocks=self.blocks,
            block_size=self.block_size,
            max_tokens=self.max_tokens,
            max_sequences=self.max_sequences,
            max_context=max_context,
        )


def config_of(source: PretrainedConfig) -> ModelConfig:
    """As read_config makes it of a directory."""
    return ModelConfig(
        path=Path("random"),
        architecture={"qwen3": "Qwen3ForCausalLM", "mistral": "MistralForCausalLM"}.get(
            source.model_type, "LlamaForCausalLM"
        ),
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        layers=source.num_hidden_layers,
        heads=source.num_attention_heads,
        max_context=source.max_position_embeddings,
        dtype=torch.bfloat16,
        tied=bool(source.tie_word_embeddings),
        source=source,
    )


def executor(
    shape: str,
    device: torch.device,
    sizes: Sizes,
    *,
    quantization: str = "none",
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    ahead: bool = True,
) -> GpuExecutor:
    """A warm executor over a random model of one of SHAPES; `kv_dtype` None for `dtype`."""
    config = config_of(SHAPES[shape]())
    model = GpuLlama(config, RandomCheckpoint(dtype, device), quantization)
    geometry = KvGeometry.of(
        "random", model.layers, model.kv_heads, model.head_dim, kv_dtype or dtype, sizes.block_size
    )
    pool = KvPool(geometry, sizes.blocks, device=device)
    made = GpuExecutor(model, pool, sizes.capacity(config.max_context), ahead=ahead)
    made.warm_up()
    return made


def give_back(device: torch.device) -> None:
    """Let go of memory that nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
