"""A tiny Llama trained by this project, and what it was trained with."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The directory with the configuration, tokenizer and weights, as transformers reads it."""
    return Path(__file__).parent / "weights"
