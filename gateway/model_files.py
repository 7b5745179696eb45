"""What the gateway reads from a model directory: limits, special tokens, sampling defaults.

Knows the JSON files beside the weights; never opens the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.errors import ModelError

# The name that each architecture gives to the longest sequence it was made for.
_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values of sampling parameters that the caller leaves unset."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A served model as the public API describes it."""

    name: str
    vocab_size: int
    max_context: int
    eos_token_ids: frozenset[int]
    defaults: SamplingDefaults


def load_facts(directory: Path, name: str = "") -> ModelFacts:
    """Read config.json and generation_config.json. Raises ModelError."""
    config = read_json(directory / "config.json")
    if config is None:
        raise ModelError(f"{directory}: no config.json: not a Hugging Face model directory")
    generation = read_json(directory / "generation_config.json") or {}
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    return ModelFacts(
        name=name or directory.resolve().name,
        vocab_size=_positive(directory, text, "vocab_size"),
        max_context=_max_context(directory, text),
        eos_token_ids=_eos_token_ids(generation, text),
        defaults=_sampling_defaults(generation),
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None when there is no such file. Raises ModelError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return content


def _positive(directory: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"{directory / 'config.json'}: {key} must be a positive number")
    return value


def _max_context(directory: Path, config: dict[str, Any]) -> int:
    for key in _CONTEXT_KEYS:
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    raise ModelError(f"{directory / 'config.json'}: says nothing about the longest context")


def _eos_token_ids(generation: dict[str, Any], config: dict[str, Any]) -> frozenset[int]:
    """generation_config wins, as in transformers' generate."""
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list) else [value])


def _sampling_defaults(generation: dict[str, Any]) -> SamplingDefaults:
    """What the model's authors recommend; greedy when they do not ask for sampling."""
    penalty = float(generation.get("repetition_penalty") or 1.0)
    if not generation.get("do_sample"):
        return SamplingDefaults(repetition_penalty=penalty)
    temperature = generation.get("temperature")
    return SamplingDefaults(
        temperature=1.0 if temperature is None else float(temperature),
        top_k=int(generation.get("top_k") or 0),
        top_p=float(generation.get("top_p") or 1.0),
        min_p=float(generation.get("min_p") or 0.0),
        repetition_penalty=penalty,
    )
