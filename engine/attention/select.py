"""Attention backends by name; each is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from baton.errors import ConfigError
from engine.attention.contract import AttentionBackend


def _torch(device: torch.device) -> AttentionBackend:
    from engine.attention.reference import TorchAttention

    return TorchAttention()


def _triton(device: torch.device) -> AttentionBackend:
    try:
        from engine.gpu.attention import TritonAttention
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--attention-backend triton: {error.name} is not installed (baton-serve[gpu])"
        ) from error
    return TritonAttention(device)


_BACKENDS: dict[str, Callable[[torch.device], AttentionBackend]] = {
    "torch": _torch,
    "triton": _triton,
}


def attention_names() -> tuple[str, ...]:
    """Values of `--attention-backend`; "native" is no attention backend but runs whole passes
    (engine/native/), so `select_attention` does not take it."""
    return ("auto", "native", *_BACKENDS)


def select_attention(name: str, device: torch.device | str) -> AttentionBackend:
    """A new backend; "auto" picks the fastest that runs on `device`.

    Raises ConfigError for an unknown name, and for one that cannot run on `device`.
    """
    device = torch.device(device)
    chosen = _fastest(device) if name == "auto" else name
    if chosen not in _BACKENDS:
        known = ", ".join(attention_names())
        raise ConfigError(f"--attention-backend {name}: unknown, choose one of {known}")
    return _BACKENDS[chosen](device)


def _fastest(device: torch.device) -> str:
    return "triton" if device.type == "cuda" and find_spec("triton") else "torch"
