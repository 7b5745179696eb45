"""What the fused passes have in common: which models they run at all, on a CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Iterable

from engine.model.config import ModelConfig
from engine.model.llama import read_shape

FAMILY = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
# Activations that they have, by transformers' names.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def hindrance(config: ModelConfig, sizes: Iterable[str]) -> str:
    """What stands in the way; empty if nothing does. `sizes` names those that must be multiples
    of 16: head_dim, hidden_size, intermediate_size."""
    if config.architecture not in FAMILY:
        return f"{config.architecture} is not of the Llama family"
    shape = read_shape(config)
    if config.source.hidden_act not in ACTIVATIONS:
        return f"activation {config.source.hidden_act}"
    found = {
        "head_dim": shape.head_dim,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
    }
    odd = [f"{name} {found[name]} is no multiple of 16" for name in sizes if found[name] % 16]
    return ", ".join(odd)
