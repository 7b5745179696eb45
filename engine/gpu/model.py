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
from engine.model.llama import Shape, read_shape, share_of
from engine.model.model import Output
from engine.model.part import WHOLE, Part
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
    """A PagedModel (engine/model/model.py), or a part of one: then a pass is `embed` in the first
    part, `run` in each, and `head` in the last."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        quantization: str,
        part: Part = WHOLE,
    ) -> None:
        """`quantization` as in WorkerConfig. Raises ModelError where checkpoint and configuration
        disagree."""
        shape = share_of(read_shape(config), part)
        layers, rows = part.layers(config.layers), part.vocabulary(config.vocab_size)
        self.vocab_size = config.vocab_size
        self.layers = len(layers)
        self.kv_heads = shape.kv_heads
        self.head_dim = shape.head_dim
        self.max_context = config.max_context
        self.heads = shape.heads
        self._eps = shape.eps
        self._part = part
        self._rotations = Rotations(
            Rope(config.source, shape.head_dim, torch.float32, checkpoint.device)
        )
        if part.first or config.tied:
            self._embedding = checkpoint("model.embed_tokens.weight", rows, shape.hidden)
        activation = ACTIVATIONS[config.source.hidden_act]
        self._layers = [
            Layer(index, shape, activation, checkpoint, quantization, part) for index in layers
        ]
        if part.last:
            self._norm = checkpoint("model.norm.weight", shape.hidden)
            # The head keeps the model's own format: its rounding is that of the answer itself.
            self._head = (
                self._embedding if config.tied else checkpoint("lm_head.weight", rows, shape.hidden)
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
        """The logits of these rows [R] of the flat batch, of all if None: [R, vocab_size], of which
        a part among several has its own columns.

        Nothing waits for the device, and a CUDA graph can record it.
        """
        return self.head(self.run(self.embed(inputs.token_ids), inputs, cache), rows)

    def embed(self, token_ids: Tensor) -> Tensor:
        """The residual stream at its beginning: [T, hidden]."""
        return self._part.embed(token_ids.clamp(min=0), self._embedding)

    def run(self, x: Tensor, inputs: Inputs, cache: KvCache) -> Tensor:
        """The layers: from the residual stream x [T, hidden], which is changed, to the one that the
        next part begins with, or to what the last part's head reads."""
        normed = rms_norm(x, self._layers[0].input_norm, self._eps)
        for layer, following in zip(self._layers, [*self._layers[1:], None], strict=True):
            attended = layer.attend(normed, inputs, cache)
            normed = add_rms_norm(attended, x, layer.norm, self._eps)
            added = layer.mlp(normed)
            if following is not None:
                normed = add_rms_norm(added, x, following.input_norm, self._eps)
        return add_rms_norm(added, x, self._norm, self._eps) if self._part.last else x.add_(added)

    def head(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """From what `run` of the last part gave to `logits`."""
        return F.linear(x if rows is None else x.index_select(0, rows), self._head)


class Layer:
    """The products and kernels of one layer; the norms between them are the caller's."""

    def __init__(
        self,
        index: int,
        shape: Shape,
        activation: str,
        checkpoint: Checkpoint,
        quantization: str,
        part: Part,
    ) -> None:
        prefix = f"model.layers.{index}"
        self._index, self._shape, self._activation = index, shape, activation
        self._reduce = part.reduce
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
        """Attention and its output projection, of all parts: x [T, hidden], normalized already."""
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
        return self._reduce(self._output(mixed.view(len(x), -1)))

    def mlp(self, x: Tensor) -> Tensor:
        """The gated MLP, of all parts: x [T, hidden], normalized already."""
        return self._reduce(self._down(gated(self._gate_up(x), self._activation)))


class StagedGpuLlama:
    """A part of a GpuLlama, driven by batches as engine/parallel/stage.py has it."""

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, quantization: str, part: Part
    ) -> None:
        """As GpuLlama."""
        self.model = GpuLlama(config, checkpoint, quantization, part)

    def embed(self, batch: Batch) -> Tensor:
        """See GpuLlama."""
        return self.model.embed(batch.token_ids)

    def run(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        """See GpuLlama."""
        return self.model.run(x, self.model.inputs(batch), cache)

    def logits(self, x: Tensor, batch: Batch) -> Tensor:
        """Of the rows that are wanted: [R, the part's vocabulary]."""
        return self.model.head(x, batch.logit_rows)
