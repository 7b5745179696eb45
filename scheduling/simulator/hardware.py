"""What a model is to a GPU, and a cost model from both: bytes to read and operations to do.

    generation   every pass reads the weights, and the KV of its sequences: memory-bound
    prompts      two operations per weight and token, and attention: bound by arithmetic

The two are added where a GPU would overlap them (LinearCost is linear), so small prompt chunks
come out dearer than they are, by at most one reading of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from baton.errors import ConfigError
from scheduling.cost import LinearCost


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A transformer decoder. `bytes_per_value` of weights and KV: 2 for bfloat16."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_context: int
    gated: bool = True  # three matrices in the feed-forward part, not two
    tied: bool = False  # input and output embeddings are one matrix
    bytes_per_value: int = 2
    kv_dtype: Literal["auto", "int8", "fp8"] = "auto"  # as in WorkerConfig

    @property
    def multiplied(self) -> int:
        """Weights that every token is multiplied with: all but the input embedding."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        feed_forward = (3 if self.gated else 2) * self.hidden * self.intermediate
        return self.layers * (attention + feed_forward) + self.hidden * self.vocabulary

    @property
    def weight_bytes(self) -> int:
        """Memory of all weights."""
        embedding = 0 if self.tied else self.hidden * self.vocabulary
        return (self.multiplied + embedding) * self.bytes_per_value

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        scaled = self.kv_dtype != "auto"  # with a float32 scale per head
        head = self.head_dim + 4 if scaled else self.head_dim * self.bytes_per_value
        return 2 * self.layers * self.kv_heads * head

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str) -> ModelShape:
        """From the content of a Hugging Face config.json. Raises ConfigError if something that
        is needed is not there."""
        try:
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            opt = config.get("model_type") == "opt"
            return cls(
                name=name,
                layers=int(config["num_hidden_layers"]),
                hidden=hidden,
                intermediate=int(config["ffn_dim" if opt else "intermediate_size"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                vocabulary=int(config["vocab_size"]),
                max_context=int(config["max_position_embeddings"]),
                gated=not opt,
                tied=bool(config.get("tie_word_embeddings", opt)),
                bytes_per_value=4 if _dtype(config) == "float32" else 2,
            )
        except KeyError as missing:
            raise ConfigError(f"{name}: config.json has no {missing}") from None

    @classmethod
    def load(cls, directory: Path) -> ModelShape:
        """From a model directory. Raises ConfigError."""
        path = directory / "config.json"
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {error}") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{path}: not a model's configuration")
        return cls.of(config, directory.name)


def _dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the data sheet says; bytes, bytes per second, and dense bfloat16 operations per
    second. `host_bandwidth` is what copies to and from pinned host memory get, each way."""

    name: str
    memory: float
    bandwidth: float
    operations: float
    host_bandwidth: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA's data sheets for the SXM boards. Dense operations: half of what the H100's and
        # H200's sheets print, which count sparsity. PCIe x16 has 32 GB/s each way in
        # generation 4 and 64 in generation 5; copies reach about 80% of it.
        Gpu("a100-40", 40e9, 1.555e12, 312e12, 25e9),
        Gpu("a100-80", 80e9, 2.039e12, 312e12, 25e9),
        Gpu("h100", 80e9, 3.35e12, 989e12, 50e9),
        Gpu("h200", 141e9, 4.8e12, 989e12, 50e9),
    )
}

SHAPES = {
    shape.name: shape
    for shape in (
        # From the models' published config.json.
        ModelShape("llama-2-7b", 32, 4096, 11008, 32, 32, 128, 32000, 4096),
        ModelShape("llama-2-13b", 40, 5120, 13824, 40, 40, 128, 32000, 4096),
        ModelShape("llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256, 8192),
        ModelShape("mistral-7b", 32, 4096, 14336, 32, 8, 128, 32768, 32768),
        ModelShape("qwen2.5-14b", 48, 5120, 13824, 40, 8, 128, 152064, 32768),
        ModelShape("opt-13b", 40, 5120, 20480, 40, 40, 128, 50272, 2048, gated=False, tied=True),
    )
}


@dataclass(frozen=True, slots=True)
class Efficiency:
    """How much of a GPU's peaks is reached: model bandwidth and model operations utilization.
    `launch_seconds` is what a pass costs before it does anything.

    The default bandwidth share lies between what Databricks measured for Llama-2-70B on four
    A100-80 (55%) and two H100 (60%). The profiles that DistServe publishes for OPT-13B on an
    A100-80 reach 58% (vLLM's) and 81% (its own engine's) of the operations with prompts; the
    default is below both, as an H200 has more operations to keep busy. The generating sequences of
    a pass share its reading of the weights, behind which most of their arithmetic hides: in the
    same profile 77% of it. The launch time is that of a pass replayed as a graph: an assumption.
    """

    bandwidth: float = 0.58
    operations: float = 0.5
    hidden: float = 0.75
    launch_seconds: float = 0.0005


def roofline(shape: ModelShape, gpu: Gpu, efficiency: Efficiency | None = None) -> LinearCost:
    """The cost of passes of this model on this GPU."""
    reached = efficiency or Efficiency()
    byte = 1.0 / (gpu.bandwidth * reached.bandwidth)
    operation = 1.0 / (gpu.operations * reached.operations)
    read_weights = shape.multiplied * shape.bytes_per_value * byte
    # Scores and their sum over values: two multiplications per pair of tokens and channel. All
    # pairs are counted, so a prompt's own triangle counts twice.
    attention = 4 * shape.layers * shape.heads * shape.head_dim * operation
    return LinearCost(
        base=reached.launch_seconds + read_weights,
        per_token=2 * shape.multiplied * operation,
        per_attention=attention,
        per_sequence=2 * shape.multiplied * operation * (1 - reached.hidden),
        per_context=shape.kv_bytes_per_token * byte,
    )
