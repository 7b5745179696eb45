"""Whether the fused kernels run a model; torch around Triton's attention does otherwise."""

from __future__ import annotations

from engine.gpu.model import ACTIVATIONS
from engine.model.config import ModelConfig
from engine.model.llama import read_shape
from engine.native.select import FAMILY


def hindrance(config: ModelConfig) -> str:
    """What stands in the way; empty if nothing does."""
    if config.architecture not in FAMILY:
        return f"{config.architecture} is not of the Llama family"
    if config.source.hidden_act not in ACTIVATIONS:
        return f"activation {config.source.hidden_act}"
    head_dim = read_shape(config).head_dim
    return f"head_dim {head_dim} is no multiple of 16" if head_dim % 16 else ""
