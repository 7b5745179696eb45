"""Models of well-known shapes with random weights, to measure with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES: dict[str, dict[str, Any]] = {
    # SmolLM-135M's.
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    # Pythia-160M's, as a Llama: its heads can be divided among ranks.
    "160m": {
        "vocab_size": 50304,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    # Qwen2.5-0.5B's, as a Llama.
    "0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}


def random_llama(path: Path, shape: str = "135m") -> None:
    """Save a random Llama of one of SHAPES, in bfloat16, with an output head that is the
    embedding, and a tokenizer that knows no text."""
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(path)
    Tokenizer(models.BPE()).save(str(path / "tokenizer.json"))


@contextmanager
def given_or_random(path: Path | None, shape: str) -> Iterator[tuple[Path, str]]:
    """A model directory and its name: `path`, or a random Llama of `shape`, which is gone
    afterwards."""
    if path is not None:
        yield path, path.name
        return
    with tempfile.TemporaryDirectory() as directory:
        random_llama(Path(directory), shape)
        yield Path(directory), f"random {shape}"
