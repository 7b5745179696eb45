"""Llama and its relatives: Mistral, Qwen2 and Qwen3.

They differ in which projections have biases, in norms on queries and keys, and in sliding
windows; all of it is read from the configuration when the model is built.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from baton.errors import ModelError
from engine.attention.contract import AttentionBackend, Batch, KvCache
from engine.model.config import ModelConfig
from engine.model.layers import Activation, GatedMlp, Linear, RmsNorm, activation, rotate
from engine.model.model import Output
from engine.model.part import WHOLE, Part
from engine.model.rope import Rope
from engine.model.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class Shape:
    """The architecture. `windows[i]` is layer i's sliding window, None for full attention."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: Activation
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]


def read_shape(config: ModelConfig) -> Shape:
    """The shape of a Llama, Mistral, Qwen2 or Qwen3. Raises ModelError if it is none."""
    source, family = config.source, config.source.model_type
    attention_bias = bool(getattr(source, "attention_bias", False))
    kv_heads = config.size("num_key_value_heads")
    if config.heads % kv_heads:
        raise ModelError(f"{config.path}: {config.heads} heads cannot share {kv_heads} key heads")
    return Shape(
        hidden=config.hidden_size,
        intermediate=config.size("intermediate_size"),
        heads=config.heads,
        kv_heads=kv_heads,
        head_dim=getattr(source, "head_dim", None) or config.hidden_size // config.heads,
        eps=source.rms_norm_eps,
        activation=activation(config, source.hidden_act),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=family != "qwen2" and attention_bias,
        mlp_bias=bool(getattr(source, "mlp_bias", False)),
        qk_norm=family == "qwen3",
        windows=_windows(config),
    )


def _windows(config: ModelConfig) -> tuple[int | None, ...]:
    window: int | None = getattr(config.source, "sliding_window", None)
    if config.source.model_type == "mistral":
        return (window,) * config.layers
    kinds = getattr(config.source, "layer_types", None) or ("full_attention",) * config.layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


class Llama:
    """A PagedModel (engine/model/model.py), or a part of one: then a pass is `embed` in the first
    part, `run` in each, and `logits` in the last (engine/parallel/stage.py)."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        attention: AttentionBackend,
        part: Part = WHOLE,
    ) -> None:
        """Raises ModelError where checkpoint and configuration disagree."""
        shape = share_of(read_shape(config), part)
        layers, rows = part.layers(config.layers), part.vocabulary(config.vocab_size)
        self.vocab_size = config.vocab_size
        self.layers = len(layers)
        self.kv_heads = shape.kv_heads
        self.head_dim = shape.head_dim
        self.max_context = config.max_context
        self._part = part
        self._rope = Rope(config.source, shape.head_dim, checkpoint.dtype, checkpoint.device)
        if part.first or config.tied:
            self._embedding = checkpoint("model.embed_tokens.weight", rows, shape.hidden)
        self._layers = [Layer(index, shape, checkpoint, attention, part) for index in layers]
        if part.last:
            self._norm = RmsNorm(checkpoint("model.norm.weight", shape.hidden), shape.eps)
            self._head = Linear(
                self._embedding if config.tied else checkpoint("lm_head.weight", rows, shape.hidden)
            )

    def forward(self, batch: Batch, cache: KvCache) -> Output:
        """One pass."""
        return Output.of(self.logits(self.run(self.embed(batch), batch, cache), batch), batch)

    def embed(self, batch: Batch) -> Tensor:
        """The residual stream at its beginning: [T, hidden]."""
        return self._part.embed(batch.token_ids, self._embedding)

    def run(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        """The layers. x [T, hidden], changed in place where it is not needed any more."""
        cos, sin = self._rope(batch)
        for layer in self._layers:
            x = layer(x, cos, sin, batch, cache)
        return x

    def logits(self, x: Tensor, batch: Batch) -> Tensor:
        """Of the rows that are wanted: [R, the part's vocabulary]."""
        logits: Tensor = self._head(self._norm(x.index_select(0, batch.logit_rows)))
        return logits


def share_of(shape: Shape, part: Part) -> Shape:
    """What the part has of each layer."""
    return replace(
        shape,
        heads=part.share(shape.heads),
        kv_heads=part.kv_heads(shape.kv_heads),
        intermediate=part.share(shape.intermediate),
    )


class Layer:
    """Attention and MLP, each on the normalized residual stream."""

    def __init__(
        self,
        index: int,
        shape: Shape,
        checkpoint: Checkpoint,
        attention: AttentionBackend,
        part: Part,
    ) -> None:
        prefix = f"model.layers.{index}"
        self._index, self._shape, self._attention = index, shape, attention
        self._reduce = part.reduce
        self._window = shape.windows[index]
        self._scale = shape.head_dim**-0.5
        self._rotated = shape.heads + shape.kv_heads  # heads of q and k, which lie together
        self._qkv = _qkv(f"{prefix}.self_attn", shape, checkpoint)
        self._head_norm = _head_norm(f"{prefix}.self_attn", shape, checkpoint)
        self._output = _linear(
            f"{prefix}.self_attn.o_proj",
            shape.hidden,
            shape.heads * shape.head_dim,
            shape.output_bias,
            checkpoint,
        )
        self._mlp = _mlp(f"{prefix}.mlp", shape, checkpoint)
        self._attention_norm = RmsNorm(
            checkpoint(f"{prefix}.input_layernorm.weight", shape.hidden), shape.eps
        )
        self._mlp_norm = RmsNorm(
            checkpoint(f"{prefix}.post_attention_layernorm.weight", shape.hidden), shape.eps
        )

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        """x [T, hidden], changed in place where it is not needed any more."""
        attended = self._attend(self._attention_norm(x), cos, sin, batch, cache)
        x = self._reduce(attended).add_(x)
        return self._reduce(self._mlp(self._mlp_norm(x))).add_(x)

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        shape = self._shape
        heads = self._qkv(x).view(len(x), -1, shape.head_dim)  # [T, heads + 2 kv_heads, head_dim]
        qk, v = heads[:, : self._rotated], heads[:, self._rotated :]
        if self._head_norm is not None:
            qk = self._head_norm(qk)
        qk = rotate(qk, cos, sin)
        mixed = self._attention.attend(
            self._index,
            qk[:, : shape.heads],
            qk[:, shape.heads :],
            v,
            batch,
            cache,
            scale=self._scale,
            window=self._window,
        )
        return self._output(mixed.reshape(len(x), -1))


class HeadNorm:
    """Qwen3's norms of queries and keys, over each head, in one go."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        """weight [heads + kv_heads, head_dim]."""
        self._weight, self._eps = weight, eps
        self._shape = (weight.shape[-1],)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, heads + kv_heads, head_dim]."""
        return F.rms_norm(x, self._shape, eps=self._eps) * self._weight


def _linear(name: str, out: int, into: int, bias: bool, checkpoint: Checkpoint) -> Linear:
    return Linear(
        checkpoint(f"{name}.weight", out, into), checkpoint(f"{name}.bias", out) if bias else None
    )


def _qkv(prefix: str, shape: Shape, checkpoint: Checkpoint) -> Linear:
    """Queries, keys and values as one projection."""
    widths = {
        "q_proj": shape.heads * shape.head_dim,
        "k_proj": shape.kv_heads * shape.head_dim,
        "v_proj": shape.kv_heads * shape.head_dim,
    }
    weights = [checkpoint(f"{prefix}.{n}.weight", out, shape.hidden) for n, out in widths.items()]
    biases = [checkpoint(f"{prefix}.{n}.bias", out) for n, out in widths.items() if shape.qkv_bias]
    return Linear(torch.cat(weights), torch.cat(biases) if biases else None)


def _head_norm(prefix: str, shape: Shape, checkpoint: Checkpoint) -> HeadNorm | None:
    if not shape.qk_norm:
        return None
    q = checkpoint(f"{prefix}.q_norm.weight", shape.head_dim).expand(shape.heads, -1)
    k = checkpoint(f"{prefix}.k_norm.weight", shape.head_dim).expand(shape.kv_heads, -1)
    return HeadNorm(torch.cat((q, k)), shape.eps)


def _mlp(prefix: str, shape: Shape, checkpoint: Checkpoint) -> GatedMlp:
    names = ("gate_proj", "up_proj")
    weights = [checkpoint(f"{prefix}.{n}.weight", shape.intermediate, shape.hidden) for n in names]
    biases = [checkpoint(f"{prefix}.{n}.bias", shape.intermediate) for n in names if shape.mlp_bias]
    gate_up = Linear(torch.cat(weights), torch.cat(biases) if biases else None)
    down = _linear(
        f"{prefix}.down_proj", shape.hidden, shape.intermediate, shape.mlp_bias, checkpoint
    )
    return GatedMlp(gate_up, down, shape.activation)
