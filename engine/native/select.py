"""Whether the compiled library runs a model, and in which formats; plain torch does otherwise."""

from __future__ import annotations

import logging

import torch

from baton.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.fused import hindrance
from engine.model.options import ModelOptions
from engine.native.library import Format, Library, load

_logger = logging.getLogger(__name__)

QUANTIZATIONS = {"none": None, "int8": Format.INT8, "int4": Format.INT4}
# What --dtype auto makes of a checkpoint's own format; float32 of any other. The library has no
# float16; it widens bfloat16 in registers on processors that cannot multiply it.
_AUTO = {
    torch.float16: torch.bfloat16,
    torch.bfloat16: torch.bfloat16,
}


def select_library(config: ModelConfig, options: ModelOptions) -> Library | None:
    """The library if it is to run the model, else None; one line in the log says why not.

    Raises ConfigError where it cannot but is asked for, by name or by a quantization, and
    ModelError where the configuration of the model makes no sense.
    """
    asked = {
        "--attention-backend native": options.attention_backend == "native",
        f"--quantization {options.quantization}": options.quantization != "none",
    }
    if options.attention_backend not in ("auto", "native"):
        reason = f"--attention-backend {options.attention_backend}"
    else:
        reason = _hindrance(config, options)
    if not reason:
        return load()
    for flag, given in asked.items():
        if given:
            raise ConfigError(f"{flag}: the compiled CPU backend cannot run: {reason}")
    _logger.info("compiled backend: %s; torch runs the step", reason)
    return None


def step_dtype(options: ModelOptions, stored: torch.dtype) -> torch.dtype:
    """The format of weights and KV for a checkpoint stored in `stored`."""
    if options.dtype != "auto":
        chosen: torch.dtype = getattr(torch, options.dtype)
        return chosen
    return _AUTO.get(stored, torch.float32)


def _hindrance(config: ModelConfig, options: ModelOptions) -> str:
    """What stands in the way; empty if nothing does."""
    if torch.device(options.device).type != "cpu":
        return f"--device {options.device}"
    if load() is None:
        return "not built here"
    if options.dtype == "float16":
        return "--dtype float16"
    if options.quantization not in QUANTIZATIONS:
        return f"it has no {options.quantization} weights"
    if options.kv_dtype == "fp8":
        return "--kv-dtype fp8"
    return hindrance(config, ("head_dim", "hidden_size", "intermediate_size"))
