"""Any decoder-only architecture that transformers implements, over the paged cache.

transformers computes everything but attention, which goes to our backend. Slower than the native
models, and served only if every check of hf_checks.py passes: a model that would come out wrong
is refused at load.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from baton.errors import ModelError
from engine.attention.contract import AttentionBackend, Batch, KvCache
from engine.model import hf_checks
from engine.model.config import ModelConfig
from engine.model.hf_attention import (
    IMPLEMENTATION,
    AttentionCall,
    UnsupportedAttention,
    attending,
)
from engine.model.model import Output
from engine.model.rope import safe_context
from engine.model.weights import Checkpoint


class TransformersModel:
    """A PagedModel (engine/model/model.py) around one of transformers'."""

    def __init__(
        self,
        model: PreTrainedModel,
        attention: AttentionBackend,
        geometry: hf_checks.Geometry,
        max_context: int,
    ) -> None:
        """`model` already has our attention set, and `geometry` was seen in it."""
        self.vocab_size = geometry.vocab_size
        self.layers = geometry.layers
        self.kv_heads = geometry.kv_heads
        self.head_dim = geometry.head_dim
        self.dtype = geometry.dtype
        self.max_context = max_context
        self._model = model
        self._attention = attention
        self._cuts_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, batch: Batch, cache: KvCache) -> Output:
        """One pass."""

        def attend(call: AttentionCall) -> Tensor:
            width = call.v.shape[-1]  # multi-head latent attention has values shorter than keys
            mixed = self._attention.attend(
                call.layer,
                call.q,
                call.k,
                pad(call.v, (0, self.head_dim - width)) if width < self.head_dim else call.v,
                batch,
                cache,
                scale=call.scale,
                window=call.window,
                softcap=call.softcap,
            )
            return mixed[..., :width]

        arguments: dict[str, Any] = {
            "input_ids": batch.token_ids[None],
            "position_ids": batch.positions[None],
            "use_cache": False,
        }
        with attending(attend):
            if self._cuts_logits:
                output = self._model(**arguments, logits_to_keep=batch.logit_rows)
                logits: Tensor = output.logits[0]
            else:
                logits = self._model(**arguments).logits[0].index_select(0, batch.logit_rows)
        return Output.of(logits, batch)


def load_fallback(
    path: Path,
    config: ModelConfig,
    dtype: torch.dtype | None,
    device: torch.device | str,
    attention: AttentionBackend,
) -> TransformersModel:
    """Load and check a model that has no native implementation; `dtype` None is the checkpoint's.

    Only safetensors, no code from the model directory. Raises ModelError, with the reason, for a
    model that cannot be served exactly as transformers would run it.
    """
    name = f"{path}: {config.architecture}"
    kind = hf_checks.model_class(config)
    hf_checks.check_config(config)
    model = _load(path, config, kind, dtype)
    nn.Module.to(model, device)
    max_context = safe_context(config)
    with torch.inference_mode():
        try:
            prompts = hf_checks.prompts(config, max_context, device)
            expected = [hf_checks.last_logits(model, prompt) for prompt in prompts]
            model.set_attn_implementation(IMPLEMENTATION)
            geometry = hf_checks.probe(model, config, prompts[0])
            paged = TransformersModel(model, attention, geometry, max_context)
            hf_checks.check_agreement(paged, prompts, expected)
        except UnsupportedAttention as error:
            raise ModelError(f"{name} cannot be served: {error}") from error
        except Exception as error:  # transformers' code, run in a way its author did not foresee
            raise ModelError(f"{name} cannot be served: {hf_checks.first_line(error)}") from error
    return paged


def _load(
    path: Path, config: ModelConfig, kind: type[PreTrainedModel], dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model with its weights, computing attention as transformers does. Weights that are stored
    quantized become dense, by our reading of them: transformers leaves theirs to other packages."""
    sources: dict[str, Any] = {"pretrained_model_name_or_path": path}
    dtype, empty = dtype or config.dtype or torch.float32, set[str]()
    try:
        if config.scheme is not None:
            sources = _dense(path, dtype)
            empty = _empty_biases(sources["state_dict"])
        with _quiet():
            loaded: Any = kind.from_pretrained(
                **sources,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                attn_implementation="eager",
                output_loading_info=True,
            )
    except ModelError:
        raise
    except Exception as error:  # transformers raises whatever the files provoked
        raise ModelError(f"{path}: {hf_checks.first_line(error)}") from error
    model: PreTrainedModel = loaded[0]  # from_pretrained has set it to evaluation
    unexpected = set(loaded[1]["unexpected_keys"]) - empty
    hf_checks.check_loading(config, loaded[1] | {"unexpected_keys": unexpected}, model)
    return model


def _dense(path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What from_pretrained is to load in the place of a quantized directory."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    weights = Checkpoint(path, dtype).dense()
    return {"pretrained_model_name_or_path": None, "config": config, "state_dict": weights}


def _empty_biases(weights: dict[str, Tensor]) -> set[str]:
    """Biases of nothing but zeros: old versions of AutoGPTQ gave one to every projection."""
    biases = (name for name in weights if name.endswith(".bias"))
    return {name for name in biases if not bool(weights[name].any())}


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no report about weights on standard error: problems are raised."""
    logging: Any = transformers_logging  # most of it has no types
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
