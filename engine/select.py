"""Which code runs an architecture: the compiled library, our torch code, or transformers' through
its attention interface."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton import cores
from engine.attention.select import select_attention
from engine.model.config import ModelConfig
from engine.model.fused import FAMILY, hindrance
from engine.model.model import PagedModel
from engine.model.options import ModelOptions
from engine.model.sampler import Choice, choose
from engine.model.weights import Checkpoint
from engine.native.library import Library
from engine.native.select import QUANTIZATIONS, select_library, step_dtype

_logger = logging.getLogger(__name__)

_NATIVE = {
    **dict.fromkeys(FAMILY, "engine.model.llama:Llama"),
    "OPTForCausalLM": "engine.model.opt:Opt",
}
_SCALED_KV = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Built:
    """A model with its weights."""

    model: PagedModel
    weight_dtype: str  # name of the weights' number format
    kv_dtype: torch.dtype
    torch_threads: int  # that a pass may use; 0 for torch's own choice
    choice: Choice = choose  # of tokens, given the model's logits
    fused: bool = False  # the model is an engine.gpu.model.GpuLlama
    ranks: int = 1  # more: an engine.parallel.model.ParallelModel, which is yet to be started


def build_model(config: ModelConfig, options: ModelOptions) -> Built:
    """Choose who runs the model, and read its weights.

    Raises ModelError if the directory cannot be served, ConfigError if the options cannot.
    """
    if options.ranks > 1:
        return _build_parallel(config, options)
    if _fuses(config, options):
        return _build_fused(config, options)
    library = select_library(config, options)
    if library is not None:
        return _build_compiled(config, options, library)
    return _build_torch(config, options)


def _fuses(config: ModelConfig, options: ModelOptions) -> bool:
    """Whether Triton kernels run the whole pass. Raises ConfigError where they are asked for by
    name and cannot run."""
    device = torch.device(options.device)
    asked = options.attention_backend == "triton"
    if not asked and (options.attention_backend != "auto" or device.type != "cuda"):
        return False
    from engine.gpu.kernels.launch import require

    require(device)
    reason = hindrance(config, ("head_dim",))
    if reason:
        _logger.info("fused GPU pass: %s; torch runs the step around Triton's attention", reason)
    return not reason


def _build_fused(config: ModelConfig, options: ModelOptions) -> Built:
    from engine.gpu.model import GpuLlama

    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    checkpoint = Checkpoint(config.path, dtype or config.dtype, options.device)
    model = GpuLlama(config, checkpoint, options.quantization)
    weights = _name(checkpoint.dtype) if options.quantization == "none" else options.quantization
    weights, kv_dtype = _shown(weights, config), _kv_dtype(options, checkpoint.dtype)
    return Built(model, weights, kv_dtype, options.threads, fused=True)


def _build_compiled(config: ModelConfig, options: ModelOptions, library: Library) -> Built:
    from engine.native.model import CompiledLlama, StepOptions

    checkpoint = Checkpoint(config.path, config.dtype)
    dtype = step_dtype(options, checkpoint.dtype)
    isa, threads = library.isa_called(options.instruction_set), options.threads or cores.available()
    model = CompiledLlama(
        config,
        checkpoint,
        library,
        StepOptions(
            dtype=dtype,
            kv_dtype=_kv_dtype(options, dtype),
            quantization=QUANTIZATIONS[options.quantization],
            block_size=options.block_size,
            max_tokens=options.max_batch_tokens,
            threads=threads,
            isa=isa,
        ),
    )
    weights = _shown(
        _name(dtype) if options.quantization == "none" else options.quantization, config
    )
    _logger.info(
        "compiled backend: %s, %d threads, %s weights", library.isa_name(isa), threads, weights
    )
    # One thread of torch's: two pools of threads on the same cores collide.
    kv_dtype = _kv_dtype(options, dtype)
    return Built(model, weights, kv_dtype, torch_threads=1, choice=model.choice)


def _build_parallel(config: ModelConfig, options: ModelOptions) -> Built:
    from engine.parallel.load import parallel_model

    fused = _fuses(config, options)
    dtype = Checkpoint(config.path, _torch_dtype(config, options)).dtype
    model = parallel_model(config, options, dtype, fused=fused)
    weights = _name(dtype) if options.quantization == "none" else options.quantization
    weights, kv_dtype = _shown(weights, config), _kv_dtype(options, dtype)
    drawn: Choice = choose
    if fused:
        from engine.gpu.choice import DeviceChoice

        drawn = DeviceChoice(model.device)
    return Built(model, weights, kv_dtype, model.threads, choice=drawn, ranks=options.ranks)


def _build_torch(config: ModelConfig, options: ModelOptions) -> Built:
    attention = select_attention(options.attention_backend, options.device)
    checkpoint = Checkpoint(config.path, _torch_dtype(config, options), options.device)
    found = _NATIVE.get(config.architecture)
    if found is None:
        from engine.model.hf import load_fallback

        model: PagedModel = load_fallback(
            config.path, config, checkpoint.dtype, options.device, attention
        )
    else:
        module, _, name = found.partition(":")
        build: Callable[..., PagedModel] = getattr(importlib.import_module(module), name)
        model = build(config, checkpoint, attention)
    kv_dtype = _kv_dtype(options, checkpoint.dtype)
    return Built(model, _shown(_name(checkpoint.dtype), config), kv_dtype, options.threads)


def _shown(weights: str, config: ModelConfig) -> str:
    """The format of weights as people read it: also that of the checkpoint, if it is quantized."""
    if config.scheme is None or config.scheme.name == weights:
        return weights
    return f"{weights} from {config.scheme.name}"


def _torch_dtype(config: ModelConfig, options: ModelOptions) -> torch.dtype | None:
    """What torch computes in; None for the format of the checkpoint's own tensors."""
    if options.dtype != "auto":
        chosen: torch.dtype = getattr(torch, options.dtype)
        return chosen
    return _slow_as_stored(config.dtype, options.device) or config.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kv_dtype(options: ModelOptions, dtype: torch.dtype) -> torch.dtype:
    """The format of KV beside a model that computes in `dtype`."""
    return _SCALED_KV.get(options.kv_dtype, dtype)


def _slow_as_stored(stored: torch.dtype | None, device: str) -> torch.dtype | None:
    """float32 for a model stored in bfloat16, on a CPU where torch would emulate every operation
    on it (a prompt then takes ten times as long); None, the model's own format, everywhere else."""
    emulated = not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if stored is torch.bfloat16 and torch.device(device).type == "cpu" and emulated:
        return torch.float32
    return None
