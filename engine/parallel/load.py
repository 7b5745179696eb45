"""A model over several ranks, from what a worker's configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch

from baton import cores
from baton.devices import device_of
from baton.errors import ConfigError
from engine.model.config import ModelConfig
from engine.model.llama import read_shape
from engine.model.options import ModelOptions
from engine.model.runner import TorchExecutor
from engine.parallel.model import ParallelModel
from engine.parallel.stage import model_module

PATIENCE = 120.0  # longest wait for another rank in a pass, seconds


def parallel_model(
    config: ModelConfig, options: ModelOptions, dtype: torch.dtype, *, fused: bool
) -> ParallelModel:
    """The model, not started yet; `fused`: its ranks run Triton's kernels. Raises ConfigError and
    ModelError."""
    ranks = options.tensor_parallel * options.pipeline_parallel
    if options.attention_backend == "native":
        raise ConfigError(
            "--tensor-parallel, --pipeline-parallel: not with --attention-backend native"
        )
    if options.quantization != "none" and not fused:
        raise ConfigError(
            "--tensor-parallel, --pipeline-parallel: with --quantization only where Triton's "
            "kernels run the model"
        )
    _require_devices(options.device, ranks)
    model_module(config, fused=fused)  # must know of parts
    threads = cores.share(options.threads or cores.available(), ranks)
    return ParallelModel(
        config, read_shape(config), options, dtype, fused=fused, threads=threads, patience=PATIENCE
    )


def room_for_blocks(model: ParallelModel, trial: Callable[[], TorchExecutor], share: float) -> int:
    """Blocks that every rank has room for on its GPU. `trial` makes an executor over a small pool;
    what that leaves of `share` of the GPU is for KV. Raises ConfigError if nothing is left."""
    model.begin_trial()
    trial().warm_up()
    return model.end_trial(share)


def _require_devices(device: str, ranks: int) -> None:
    """Raise ConfigError where not every rank can have a device of its own."""
    if torch.device(device).type == "cpu":
        return
    first, there = torch.device(device_of(device, 0)).index, torch.cuda.device_count()
    if torch.device(device).type != "cuda" or first + ranks > there:
        raise ConfigError(
            f"--tensor-parallel, --pipeline-parallel: {ranks} ranks from --device {device} on, "
            f"but there are {there} GPUs"
        )
