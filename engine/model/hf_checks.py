"""Why a model may not go through transformers' attention interface: every check at load.

Some architectures compute attention without the interface, in some layers only, or with terms
that paged attention does not have, and give wrong text without any error. In order: what the
configuration says (`check_config`), what the files hold (`check_loading`), what each layer asks
of attention (`probe`), and whether a prompt in awkward pieces gives transformers' own logits
(`check_agreement`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from baton.errors import ModelError
from baton.types import Request, Sampling, Stopping
from engine.attention.contract import Batch, KvCache
from engine.model.batch import build_batch
from engine.model.config import ModelConfig
from engine.model.hf_attention import AttentionCall, UnsupportedAttention, attending
from engine.model.model import Output
from engine.model.pool import KvGeometry, KvPool
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence

_LAYER_KINDS = frozenset({"full_attention", "sliding_attention"})

# Largest norm of the logits' difference, relative to that of their deviation from their mean.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Windows up to this length are crossed by the test prompts.
_TESTED_WINDOW = 256
_BLOCK_SIZE = 4


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a model's attention was seen to need of the cache."""

    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


class Paged(Protocol):
    """The part of PagedModel that is checked."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def forward(self, batch: Batch, cache: KvCache) -> Output:
        """One pass."""
        ...


def model_class(config: ModelConfig) -> type[PreTrainedModel]:
    """transformers' class for the architecture. Raises ModelError if there is none to serve."""
    name = config.architecture
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ModelError(f"{config.path}: {name} is not a decoder-only language model")
    kind: type[PreTrainedModel] = getattr(transformers, name)
    if not kind._supports_attention_backend:
        raise ModelError(f"{config.path}: {name} does not let its attention be replaced")
    return kind


def check_config(config: ModelConfig) -> None:
    """Refuse what the configuration itself gives away. Raises ModelError."""
    source, name = config.source, f"{config.path}: {config.architecture}"
    if source.is_encoder_decoder:
        raise ModelError(f"{name} is an encoder-decoder")
    odd = sorted(set(getattr(source, "layer_types", None) or ()) - _LAYER_KINDS)
    if odd:
        raise ModelError(f"{name} has layers of kind {', '.join(odd)}")
    if getattr(source, "attention_chunk_size", None) is not None:
        raise ModelError(f"{name} has chunked attention")


def check_loading(config: ModelConfig, info: dict[str, Any], model: PreTrainedModel) -> None:
    """Refuse a checkpoint that does not fit the architecture. Raises ModelError."""
    if config.scheme is not None and any(isinstance(part, Conv1D) for part in model.modules()):
        raise ModelError(
            f"{config.path}: {config.architecture} has its weights transposed, which is not "
            f"supported in quantized checkpoints ({config.scheme.method})"
        )
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        found = sorted(str(key) for key in info.get(problem) or ())
        if found:
            raise ModelError(
                f"{config.path}: weights do not fit {config.architecture}: "
                f"{problem.replace('_', ' ')}: {', '.join(found[:3])}"
            )


def prompts(config: ModelConfig, max_context: int, device: torch.device | str) -> list[Tensor]:
    """Two prompts of random tokens, long enough to leave a short sliding window."""
    window = getattr(config.source, "sliding_window", None) or 0
    length = min(max_context, 24 + (window if window <= _TESTED_WINDOW else 0))
    random = torch.Generator().manual_seed(0)
    return [
        torch.randint(config.vocab_size, (size,), generator=random).to(device)
        for size in (length, max(1, length // 2))
    ]


def last_logits(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """What transformers computes for the token after a prompt: [vocab]."""
    logits: Tensor = model(input_ids=prompt[None], use_cache=False).logits[0, -1]
    return logits


def probe(model: PreTrainedModel, config: ModelConfig, prompt: Tensor) -> Geometry:
    """Run a prompt and look at what every layer asks of attention.

    Raises UnsupportedAttention if that is not one call per layer, in order, all of one shape, with
    the sliding windows that the configuration names.
    """
    calls: list[AttentionCall] = []

    def record(call: AttentionCall) -> Tensor:
        calls.append(call)
        return call.q.new_zeros(*call.q.shape[:2], call.v.shape[-1])

    positions = torch.arange(len(prompt), device=prompt.device)
    with attending(record):
        logits = model(input_ids=prompt[None], position_ids=positions[None], use_cache=False).logits
    layers = [call.layer for call in calls]
    if layers != list(range(config.layers)):
        raise UnsupportedAttention(
            f"of its {config.layers} layers, attention is replaced in {layers or 'none'}"
        )
    _check_windows(config, [call.window for call in calls])
    shapes = {(call.k.shape, call.v.shape) for call in calls}
    (k_shape, v_shape), *others = shapes
    if others or k_shape[1] != v_shape[1] or k_shape[2] < v_shape[2]:
        raise UnsupportedAttention("its keys and values are not of one size in all layers")
    return Geometry(
        vocab_size=logits.shape[-1],
        layers=config.layers,
        kv_heads=k_shape[1],
        head_dim=k_shape[2],
        dtype=calls[0].k.dtype,
    )


def check_agreement(model: Paged, prompts: list[Tensor], expected: list[Tensor]) -> None:
    """Run two prompts in pieces that share passes, and compare with transformers' own logits.

    Raises UnsupportedAttention if they differ by more than rounding does.
    """
    for wanted, got in zip(expected, _in_pieces(model, prompts), strict=True):
        wanted, got = wanted.double(), got.double()
        error = float((got - wanted).norm() / (wanted - wanted.mean()).norm())
        if not error <= _TOLERANCE[expected[0].dtype]:  # a NaN fails too
            raise UnsupportedAttention(
                f"it differs from transformers' own result by {error:.1e} in a test prompt"
            )


def first_line(error: Exception) -> str:
    """Kind and first line of an error, for a message on one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _check_windows(config: ModelConfig, windows: list[int | None]) -> None:
    """Every layer must ask for the window that its configuration gives it: transformers puts
    windows into masks too, and ours would not be there."""
    window: int | None = getattr(config.source, "sliding_window", None)
    kinds = getattr(config.source, "layer_types", None) or ["sliding_attention"] * config.layers
    expected = [window if kind == "sliding_attention" else None for kind in kinds]
    limits = [
        [length if length and length < config.max_context else None for length in lengths]
        for lengths in (windows, expected)
    ]
    if limits[0] != limits[1]:
        raise UnsupportedAttention(f"its layers ask for windows {windows} instead of {expected}")


def _in_pieces(model: Paged, prompts: list[Tensor]) -> list[Tensor]:
    """Logits after each of two prompts, [vocab], from three passes that cut and mix them."""
    pool = _pool(model, prompts)
    a, b = (_scratch(prompt.tolist()) for prompt in prompts)
    width = pool.blocks // 2
    a.blocks = list(range(0, 2 * width, 2))  # neighbours in neither sequence lie side by side
    b.blocks = list(range(1, 2 * width, 2))
    half, most = len(a.tokens) // 3, len(a.tokens) - 1
    passes = (
        [_chunk(a, 0, half), _chunk(b, 0, 1)],
        [_chunk(b, 1, len(b.tokens)), _chunk(a, half, most)],
        [_chunk(a, most, len(a.tokens))],
    )
    last: dict[int, Tensor] = {}
    for chunks in passes:
        plan = StepPlan(tuple(chunk for chunk in chunks if chunk.length))
        if not plan.chunks:
            continue
        batch, rows = build_batch(plan, pool.block_size, pool.storage.device)
        logits = model.forward(batch, pool).logits
        for chunk, row in zip(plan.chunks, rows, strict=True):
            if row.sample is not None:
                last[id(chunk.sequence)] = logits[row.sample]
    return [last[id(a)], last[id(b)]]


def _pool(model: Paged, prompts: list[Tensor]) -> KvPool:
    """Small blocks, enough for two sequences of the longest prompt."""
    dtype = model.dtype
    geometry = KvGeometry.of(
        model_fingerprint="",
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        dtype=dtype,
        block_size=_BLOCK_SIZE,
    )
    blocks = -(-max(len(prompt) for prompt in prompts) // _BLOCK_SIZE)
    return KvPool(geometry, 2 * blocks, device=prompts[0].device)


def _scratch(tokens: list[int]) -> Sequence:
    request = Request("load check", tuple(tokens), Sampling(), Stopping(max_tokens=1), logprobs=0)
    return Sequence.start(request, 0, now=0.0)


def _chunk(sequence: Sequence, start: int, end: int) -> Chunk:
    return Chunk(sequence, start, end - start, sample=end == len(sequence.tokens))
