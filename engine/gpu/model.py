"""Llama and its relatives as a string of fused kernels.

What engine/model/llama.py is in torch, over the same files, the same KV and with the same results
but for rounding. Between the products, each layer is five kernels: norm with the residual, rotation
with the write into the pool, attention, norm, gated activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.attention.contract import Batch, KvCache
from engine.gpu.attention import attend
from engine.gpu.kernels.activation import gated
from engine.gpu.kernels.norm import add_rms_norm, rms_norm
from engine.gpu.kernels.rope import rotate_and_store
from engine.gpu.linear import GpuLinear, linear
from engine.gpu.ragged import Ragged
from engine.model.config import ModelConfig
from engine.model.fused import ACTIVATIONS
from engine.model.llama import Shape, read_shape
from engine.model.model import Output
from engine.model.rope import Rope, Rotations
from engine.model.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class Inputs:
    """One pass on the device, T tokens. A CUDA graph reads the same tensors at every replay."""

    token_ids: Tensor  # [T] int64
    slots: Tensor  # [T] int64: where each token's KV goes; -1 for a row that stands for nothing
    rotations: Tensor  # [P, head_dim] float32: cosines, then sines
    rotation_rows: Tensor  # [T] int64: each token's row of them
    ragged: Ragged


class GpuLlama:
    """A PagedModel (engine/model/model.py)."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, quantization: str) -> None:
        """`quantization` as in WorkerConfig. Raises ModelError where checkpoint and configuration
        disagree."""
        shape = read_shape(config)
        self.vocab_size = config.vocab_size
        self.layers = config.layers
        self.kv_heads = shape.kv_heads
        self.head_dim = shape.head_dim
        self.max_context = config.max_context
        self.heads = shape.heads
        self._eps = shape.eps
        self._rotations = Rotations(
            Rope(config.source, shape.head_dim, torch.float32, checkpoint.device)
        )
        self._embedding = checkpoint("model.embed_tokens.weight", config.vocab_size, shape.hidden)
        activation = ACTIVATIONS[config.source.hidden_act]
        self._layers = [
            Layer(index, shape, activation, checkpoint, quantization)
            for index in range(config.layers)
        ]
        self._norm = checkpoint("model.norm.weight", shape.hidden)
        # The head keeps the model's own format: its rounding is that of the answer itself.
        self._head = (
            self._embedding
            if config.tied
            else checkpoint("lm_head.weight", config.vocab_size, shape.hidden)
        )

    @property
    def rotations(self) -> Rotations:
        """Of the model's positions."""
        return self._rotations

    @property
    def layer_bytes(self) -> int:
        """Bytes of the matrices of all layers, with their scales: what every pass reads."""
        return sum(layer.weight_bytes for layer in self._layers)

    @property
    def head_bytes(self) -> int:
        """Bytes of the output head."""
        return self._head.nbytes

    def forward(self, batch: Batch, cache: KvCache) -> Output:
        """One pass."""
        return Output.of(self.logits(self.inputs(batch), batch.logit_rows, cache), batch)

    def inputs(self, batch: Batch) -> Inputs:
        """A pass as the kernels want it."""
        rotations, rows = self._rotations.of(batch)
        return Inputs(batch.token_ids, batch.slots, rotations, rows, Ragged.of(batch))

    def logits(self, inputs: Inputs, rows: Tensor | None, cache: KvCache) -> Tensor:
        """The logits of these rows [R] of the flat batch, of all if None: [R, vocab_size].

        Nothing waits for the device, and a CUDA graph can record it.
        """
        residual = F.embedding(inputs.token_ids.clamp(min=0), self._embedding)  # [T, hidden]
        normed = rms_norm(residual, self._layers[0].input_norm, self._eps)
        following = [layer.input_norm for layer in self._layers[1:]] + [self._norm]
        for layer, norm in zip(self._layers, following, strict=True):
            normed = add_rms_norm(
                layer.attend(normed, inputs, cache), residual, layer.norm, self._eps
            )
            normed = add_rms_norm(layer.mlp(normed), residual, norm, self._eps)
        if rows is not None:
            normed = normed.index_select(0, rows)
        return F.linear(normed, self._head)


class Layer:
    """The products and kernels of one layer; the norms between them are the caller's."""

    def __init__(
        self,
        index: int,
        shape: Shape,
        activation: str,
        checkpoint: Checkpoint,
        quantization: str,
    ) -> None:
        prefix = f"model.layers.{index}"
        self._index, self._shape, self._activation = index, shape, activation
        self._window = shape.windows[index]
        self._scale = shape.head_dim**-0.5
        self.input_norm = checkpoint(f"{prefix}.input_layernorm.weight", shape.hidden)
        self.norm = checkpoint(f"{prefix}.post_attention_layernorm.weight", shape.hidden)
        attention = f"{prefix}.self_attn"
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._q_norm = self._k_norm = None
        if shape.qk_norm:
            self._q_norm = checkpoint(f"{attention}.q_norm.weight", shape.head_dim)
            self._k_norm = checkpoint(f"{attention}.k_norm.weight", shape.head_dim)

        def product(
            names: tuple[str, ...], sizes: tuple[int, ...], into: int, bias: bool
        ) -> GpuLinear:
            return linear(checkpoint, names, sizes, into, bias, quantization)

        self._qkv = product(
            tuple(f"{attention}.{name}" for name in ("q_proj", "k_proj", "v_proj")),
            (queries, keys, keys),
            shape.hidden,
            shape.qkv_bias,
        )
        self._output = product(
            (f"{attention}.o_proj",), (shape.hidden,), queries, shape.output_bias
        )
        self._gate_up = product(
            (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"),
            (shape.intermediate, shape.intermediate),
            shape.hidden,
            shape.mlp_bias,
        )
        self._down = product(
            (f"{prefix}.mlp.down_proj",), (shape.hidden,), shape.intermediate, shape.mlp_bias
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of its products' weights and scales."""
        products = (self._qkv, self._output, self._gate_up, self._down)
        return sum(product.weight_bytes for product in products)

    def attend(self, x: Tensor, inputs: Inputs, cache: KvCache) -> Tensor:
        """Attention and its output projection: x [T, hidden], normalized already."""
        shape, keys, values = self._shape, cache.keys(self._index), cache.values(self._index)
        q = rotate_and_store(
            self._qkv(x),
            inputs.rotations,
            inputs.rotation_rows,
            inputs.slots,
            keys,
            values,
            cache.scales(self._index),
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            q_norm=self._q_norm,
            k_norm=self._k_norm,
            eps=shape.eps,
        )
        mixed = attend(q, cache, self._index, inputs.ragged, scale=self._scale, window=self._window)
        return self._output(mixed.view(len(x), -1))

    def mlp(self, x: Tensor) -> Tensor:
        """The gated MLP: x [T, hidden], normalized already."""
        return self._down(gated(self._gate_up(x), self._activation))
