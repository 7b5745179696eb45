"""What a model directory says it holds, read without running any of its code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from baton.errors import ModelError
from engine.quantization.scheme import Scheme, read_scheme

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What every decoder-only model has. `source` is transformers' own configuration, for what
    only one family knows; nothing may change it."""

    path: Path
    architecture: str  # "LlamaForCausalLM"
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    max_context: int  # longest sequence, in tokens, after RoPE scaling
    dtype: torch.dtype | None  # what the checkpoint says it is stored in
    tied: bool  # the output head is the embedding
    source: PretrainedConfig
    scheme: Scheme | None = None  # how its weights are quantized, if they are

    def size(self, name: str) -> int:
        """A positive integer that only this family's configuration has. Raises ModelError."""
        return _size(self.path, self.source, name)


def read_config(path: Path) -> ModelConfig:
    """Check that `path` is a model directory that is safe to load, and read its configuration.

    Raises ModelError if it is missing, has no configuration, tokenizer or safetensors, is
    quantized in a way that is not supported, needs code of its own, or makes no sense.
    """
    _check_directory(path)
    scheme = read_scheme(path)  # before transformers, which may refuse it with less to say
    try:
        source = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever the file provoked
        raise ModelError(f"{path / 'config.json'}: {_first_line(error)}") from error
    text = source.get_text_config(decoder=True)
    architectures = getattr(source, "architectures", None) or []
    if len(architectures) != 1:
        raise ModelError(f"{path / 'config.json'}: `architectures` must name exactly one class")
    return ModelConfig(
        path=path,
        architecture=architectures[0],
        vocab_size=_size(path, text, "vocab_size"),
        hidden_size=_size(path, text, "hidden_size"),
        layers=_size(path, text, "num_hidden_layers"),
        heads=_size(path, text, "num_attention_heads"),
        max_context=_max_context(path, text),
        dtype=_dtype(source.dtype),
        tied=bool(getattr(source, "tie_word_embeddings", False)),
        source=text,
        scheme=scheme,
    )


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(f"{path}: no such model directory")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: has no config.json")
    if not any(path.glob("*.safetensors")):
        pickled = any(next(path.glob(pattern), None) for pattern in _PICKLED)
        reason = "only pickled weights, which are never loaded" if pickled else "no *.safetensors"
        raise ModelError(f"{path}: has {reason}")
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise ModelError(f"{path}: has no tokenizer")


def _size(path: Path, config: PretrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{path / 'config.json'}: {name} is {value!r}, must be a positive integer")
    return value


def _max_context(path: Path, config: PretrainedConfig) -> int:
    """`max_position_embeddings`, stretched where the RoPE variant exists to go beyond it.

    Dynamic NTK keeps the trained length there and scales as sequences outgrow it; YaRN may.
    """
    length = _size(path, config, "max_position_embeddings")
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor") or 1.0
    match rope.get("rope_type"):
        case "dynamic":
            return int(length * factor)
        case "yarn":
            trained = rope.get("original_max_position_embeddings") or length
            return max(length, int(trained * factor))
        case _:
            return length


def _dtype(value: object) -> torch.dtype | None:
    if isinstance(value, str):
        value = getattr(torch, value, None)
    return value if isinstance(value, torch.dtype) else None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
