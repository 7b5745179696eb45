"""Attention backends by name; each is imported only when it is asked for."""

from __future__ import annotations

import importlib

import torch

from baton.errors import ConfigError
from engine.attention.contract import AttentionBackend

_BACKENDS = {"torch": "engine.attention.reference:TorchAttention"}


def attention_names() -> tuple[str, ...]:
    """Values of `--attention-backend`; "native" is no attention backend but runs whole passes
    (engine/native/), so `select_attention` does not take it."""
    return ("auto", "native", *_BACKENDS)


def select_attention(name: str, device: torch.device | str) -> AttentionBackend:
    """A new backend; "auto" picks the fastest that runs on `device`.

    Raises ConfigError for an unknown name.
    """
    chosen = "torch" if name == "auto" else name
    if chosen not in _BACKENDS:
        known = ", ".join(attention_names())
        raise ConfigError(f"--attention-backend {name}: unknown, choose one of {known}")
    module, _, factory = _BACKENDS[chosen].partition(":")
    backend: AttentionBackend = getattr(importlib.import_module(module), factory)()
    return backend
