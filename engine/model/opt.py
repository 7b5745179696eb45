"""OPT: learned positions, biases, layer norms before or after each sublayer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from baton.errors import ModelError
from engine.attention.contract import AttentionBackend, Batch, KvCache
from engine.model.config import ModelConfig
from engine.model.layers import LayerNorm, Linear, activation
from engine.model.model import Output
from engine.model.weights import Checkpoint

_POSITION_OFFSET = 2  # rows of the position table before that of position 0


class Opt:
    """A PagedModel (engine/model/model.py)."""

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, attention: AttentionBackend
    ) -> None:
        """Raises ModelError where checkpoint and configuration disagree."""
        source, hidden = config.source, config.hidden_size
        if hidden % config.heads:
            raise ModelError(f"{config.path}: {hidden} is no multiple of {config.heads} heads")
        self.vocab_size = config.vocab_size
        self.layers = config.layers
        self.kv_heads = config.heads
        self.head_dim = hidden // config.heads
        self.max_context = config.max_context
        parts = _Parts(config, checkpoint)
        narrow = config.size("word_embed_proj_dim")
        self._embedding = parts.tensor("embed_tokens.weight", config.vocab_size, narrow)
        rows = config.max_context + _POSITION_OFFSET
        self._positions = parts.tensor("embed_positions.weight", rows, hidden)
        projected = narrow != hidden
        self._into = parts.linear("project_in", hidden, narrow, bias=False) if projected else None
        self._out_of = (
            parts.linear("project_out", narrow, hidden, bias=False) if projected else None
        )
        self._layers = [Layer(index, config, parts, attention) for index in range(config.layers)]
        final = source.do_layer_norm_before and not source._remove_final_layer_norm
        self._norm = parts.norm("final_layer_norm", hidden) if final else None
        head = (
            self._embedding
            if config.tied
            else checkpoint("lm_head.weight", config.vocab_size, narrow)
        )
        self._head = Linear(head)

    def forward(self, batch: Batch, cache: KvCache) -> Output:
        """One pass."""
        x = F.embedding(batch.token_ids, self._embedding)
        if self._into is not None:
            x = self._into(x)
        x = x + F.embedding(batch.positions + _POSITION_OFFSET, self._positions)  # [T, hidden]
        for layer in self._layers:
            x = layer(x, batch, cache)
        x = x.index_select(0, batch.logit_rows)
        if self._norm is not None:
            x = self._norm(x)
        if self._out_of is not None:
            x = self._out_of(x)
        return Output.of(self._head(x), batch)


class Layer:
    """Attention and MLP, each with its layer norm before it or after it."""

    def __init__(
        self, index: int, config: ModelConfig, parts: _Parts, attention: AttentionBackend
    ) -> None:
        source, hidden, prefix = config.source, config.hidden_size, f"layers.{index}"
        bias = source.enable_bias
        self._index, self._attention = index, attention
        self._heads, self._head_dim = config.heads, hidden // config.heads
        self._scale = self._head_dim**-0.5
        self._norm_first = source.do_layer_norm_before
        self._qkv = parts.qkv(f"{prefix}.self_attn", hidden, bias)
        self._output = parts.linear(f"{prefix}.self_attn.out_proj", hidden, hidden, bias)
        self._attention_norm = parts.norm(f"{prefix}.self_attn_layer_norm", hidden)
        self._up = parts.linear(f"{prefix}.fc1", config.size("ffn_dim"), hidden, bias)
        self._down = parts.linear(f"{prefix}.fc2", hidden, config.size("ffn_dim"), bias)
        self._mlp_norm = parts.norm(f"{prefix}.final_layer_norm", hidden)
        self._activation = activation(config, source.activation_function)

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        if self._norm_first:
            x = x + self._attend(self._attention_norm(x), batch, cache)
            return x + self._mlp(self._mlp_norm(x))
        x = self._attention_norm(x + self._attend(x, batch, cache))
        return self._mlp_norm(x + self._mlp(x))

    def _attend(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        heads = self._qkv(x).view(len(x), 3, self._heads, self._head_dim)
        q, k, v = heads.unbind(1)
        mixed = self._attention.attend(self._index, q, k, v, batch, cache, scale=self._scale)
        return self._output(mixed.reshape(len(x), -1))

    def _mlp(self, x: Tensor) -> Tensor:
        return self._down(self._activation(self._up(x)))


class _Parts:
    """Reads the decoder's weights, with or without the prefix that old checkpoints lack."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        self._affine = config.source.layer_norm_elementwise_affine
        self._checkpoint = checkpoint
        prefixes = ("model.decoder.", "decoder.")
        found = [p for p in prefixes if f"{p}embed_tokens.weight" in checkpoint]
        self._prefix = found[0] if found else prefixes[0]

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self._checkpoint(self._prefix + name, *shape)

    def linear(self, name: str, out: int, into: int, bias: bool) -> Linear:
        weight = self.tensor(f"{name}.weight", out, into)
        return Linear(weight, self.tensor(f"{name}.bias", out) if bias else None)

    def norm(self, name: str, size: int) -> LayerNorm:
        if not self._affine:
            return LayerNorm(size, None, None)
        weight, bias = self.tensor(f"{name}.weight", size), self.tensor(f"{name}.bias", size)
        return LayerNorm(size, weight, bias)

    def qkv(self, prefix: str, hidden: int, bias: bool) -> Linear:
        """Queries, keys and values as one projection."""
        names = ("q_proj", "k_proj", "v_proj")
        weights = [self.tensor(f"{prefix}.{name}.weight", hidden, hidden) for name in names]
        biases = [self.tensor(f"{prefix}.{name}.bias", hidden) for name in names if bias]
        return Linear(torch.cat(weights), torch.cat(biases) if biases else None)
