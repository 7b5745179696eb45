"""A model over several ranks, from what a worker's configuration asks for."""

from __future__ import annotations

import torch

from baton import cores
from baton.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.llama import read_shape
from engine.model.options import ModelOptions
from engine.parallel.model import ParallelModel
from engine.parallel.stage import model_module

PATIENCE = 120.0  # longest wait for another rank in a pass, seconds


def parallel_model(config: ModelConfig, options: ModelOptions, dtype: torch.dtype) -> ParallelModel:
    """The model, not started yet. Raises ConfigError and ModelError."""
    ranks = options.tensor_parallel * options.pipeline_parallel
    if options.attention_backend == "native" or options.quantization != "none":
        raise ConfigError(
            "--tensor-parallel, --pipeline-parallel: neither with --attention-backend native nor "
            "with --quantization"
        )
    if options.device != "cpu":
        raise ConfigError(
            "--tensor-parallel, --pipeline-parallel: on CPUs only so far, "
            f"not on --device {options.device}"
        )
    model_module(config)  # must know of parts
    threads = cores.share(options.threads or cores.available(), ranks)
    return ParallelModel(
        config, read_shape(config), options, dtype, threads=threads, patience=PATIENCE
    )
