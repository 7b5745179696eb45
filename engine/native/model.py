"""Llama and its relatives, a whole pass in one call of the compiled library.

What engine/model/llama.py is in torch, over the same files, the same KV and with the same results
but for rounding. Weights are packed tensor by tensor out of the mapped files; the embedding stays
there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.attention.contract import Batch, KvCache
from engine.model.config import ModelConfig
from engine.model.fused import ACTIVATIONS
from engine.model.llama import Shape, read_shape
from engine.model.model import Output
from engine.model.rope import Rope, Rotations
from engine.model.weights import Checkpoint
from engine.native import library
from engine.native.library import Activation, BatchView, Format, Isa, Library, Matrix, Times, Vector
from engine.native.sampling import CompiledChoice
from engine.native.step import FORMATS, CompiledStep

_FIRST_ROTATIONS = 2048  # positions that the table of a fixed RoPE begins with


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How the library runs a model; what depends on the worker and not on the model."""

    dtype: torch.dtype  # of the weights unless they are quantized
    kv_dtype: torch.dtype
    quantization: Format | None
    block_size: int
    max_tokens: int  # of one pass
    threads: int
    isa: Isa


class CompiledLlama:
    """A PagedModel (engine/model/model.py)."""

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, lib: Library, options: StepOptions
    ) -> None:
        """Raises ModelError where checkpoint and configuration disagree."""
        shape = read_shape(config)
        self.vocab_size = config.vocab_size
        self.layers = config.layers
        self.kv_heads = shape.kv_heads
        self.head_dim = shape.head_dim
        self.max_context = config.max_context
        self.times: Times | None = None  # set one to have every pass write its times there
        self._rotations = Rotations(Rope(config.source, shape.head_dim, torch.float32, "cpu"))
        if self._rotations.fixed:
            self._rotations.upto(_FIRST_ROTATIONS)
        self._step = CompiledStep(
            lib, _shape(config, shape, options), threads=options.threads, isa=options.isa
        )
        self.choice = CompiledChoice(self._step.sample, self._step.report)
        self._block_size = options.block_size
        _Packer(self._step, checkpoint, config, shape).pack()

    def use_threads(self, count: int) -> None:
        """Let so many of its threads compute from now on."""
        self._step.use(count)

    @property
    def packed_bytes(self) -> int:
        """Memory that the weights take, the embedding not counted."""
        return self._step.packed_bytes

    def forward(self, batch: Batch, cache: KvCache) -> Output:
        """One pass."""
        assert cache.block_size == self._block_size
        rows, whole = len(batch.logit_rows), batch.whole_rows
        logits = torch.empty(whole, self.vocab_size)
        best, best_logits = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        targets = torch.full((rows,), -1, dtype=torch.int32)
        if whole:
            targets[:whole] = torch.arange(whole, dtype=torch.int32)
        spans = np.array((batch.starts, batch.lengths), dtype=np.int32)
        rotations, rotation_rows = self._rotations.of(batch)
        rotation_rows = rotation_rows.to(torch.int32)
        view = BatchView(
            tokens=len(batch.token_ids),
            sequences=len(batch.starts),
            rows=rows,
            width=batch.block_tables.shape[1],
            token_ids=batch.token_ids.data_ptr(),
            slots=batch.slots.data_ptr(),
            starts=spans.ctypes.data,
            lengths=spans[1].ctypes.data,
            tables=batch.block_tables.data_ptr(),
            rotations=rotations.data_ptr(),
            rotation_rows=rotation_rows.data_ptr(),
            logit_rows=batch.logit_rows.data_ptr(),
            logit_targets=targets.data_ptr(),
            kv=cache.keys(0).data_ptr(),  # where the pool begins
            logits=logits.data_ptr() if whole else None,
            best=best.data_ptr(),
            best_logits=best_logits.data_ptr(),
        )
        self._step.run(view, self.times)
        best, best_logits = best[whole:], best_logits[whole:]
        return Output(logits, best.masked_fill_(best_logits == -torch.inf, -1))


def _shape(config: ModelConfig, shape: Shape, options: StepOptions) -> library.Shape:
    weights = options.quantization or FORMATS[options.dtype]
    return library.Shape(
        layers=config.layers,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocabulary=config.vocab_size,
        activation=Activation[ACTIVATIONS[config.source.hidden_act].upper()],
        weights=weights,
        # An error of the head is one of the logits: four bits there cost half as much again.
        head=Format.INT8 if weights is Format.INT4 else weights,
        kv=Format.INT8 if options.kv_dtype is torch.int8 else FORMATS[options.dtype],
        block_size=options.block_size,
        max_tokens=options.max_tokens,
        eps=shape.eps,
        scale=shape.head_dim**-0.5,
    )


class _Packer:
    """Gives the library all that a model has, one tensor of the files after another."""

    def __init__(
        self, step: CompiledStep, checkpoint: Checkpoint, config: ModelConfig, shape: Shape
    ) -> None:
        self._step, self._checkpoint, self._config = step, checkpoint, config
        self._shape = shape

    def pack(self) -> None:
        """All of it."""
        vocabulary, hidden = self._config.vocab_size, self._shape.hidden
        embedding = "model.embed_tokens.weight"
        self._step.embedding(self._checkpoint.mapped(embedding, vocabulary, hidden))
        for layer in range(self._config.layers):
            self._attention(layer)
            self._mlp(layer)
            window = self._shape.windows[layer]
            if window is not None:
                self._step.window(layer, window)
        self._vector(0, Vector.FINAL_NORM, 0, "model.norm.weight", hidden)
        head = embedding if self._config.tied else "lm_head.weight"
        self._matrix(0, Matrix.HEAD, 0, head, vocabulary, hidden)

    def _attention(self, layer: int) -> None:
        shape, prefix = self._shape, f"model.layers.{layer}"
        attention = f"{prefix}.self_attn"
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._vector(layer, Vector.INPUT_NORM, 0, f"{prefix}.input_layernorm.weight", shape.hidden)
        first = 0
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            self._matrix(layer, Matrix.QKV, first, f"{attention}.{name}.weight", rows, shape.hidden)
            if shape.qkv_bias:
                self._vector(layer, Vector.QKV_BIAS, first, f"{attention}.{name}.bias", rows)
            first += rows
        if shape.qk_norm:
            self._vector(layer, Vector.Q_NORM, 0, f"{attention}.q_norm.weight", shape.head_dim)
            self._vector(layer, Vector.K_NORM, 0, f"{attention}.k_norm.weight", shape.head_dim)
        self._matrix(layer, Matrix.OUTPUT, 0, f"{attention}.o_proj.weight", shape.hidden, queries)
        if shape.output_bias:
            self._vector(layer, Vector.OUTPUT_BIAS, 0, f"{attention}.o_proj.bias", shape.hidden)

    def _mlp(self, layer: int) -> None:
        shape, prefix = self._shape, f"model.layers.{layer}"
        norm = f"{prefix}.post_attention_layernorm.weight"
        self._vector(layer, Vector.MLP_NORM, 0, norm, shape.hidden)
        parts = (
            (Matrix.GATE_UP, Vector.GATE_UP_BIAS, 0, "gate_proj", shape.intermediate),
            (
                Matrix.GATE_UP,
                Vector.GATE_UP_BIAS,
                shape.intermediate,
                "up_proj",
                shape.intermediate,
            ),
            (Matrix.DOWN, Vector.DOWN_BIAS, 0, "down_proj", shape.hidden),
        )
        for matrix, bias, first, name, rows in parts:
            into = shape.hidden if matrix is Matrix.GATE_UP else shape.intermediate
            self._matrix(layer, matrix, first, f"{prefix}.mlp.{name}.weight", rows, into)
            if shape.mlp_bias:
                self._vector(layer, bias, first, f"{prefix}.mlp.{name}.bias", rows)

    def _matrix(
        self, layer: int, matrix: Matrix, first: int, name: str, rows: int, into: int
    ) -> None:
        self._step.pack(layer, matrix, first, self._checkpoint.mapped(name, rows, into))
        self._checkpoint.forget(name)

    def _vector(self, layer: int, vector: Vector, first: int, name: str, count: int) -> None:
        self._step.vector(layer, vector, first, self._checkpoint.mapped(name, count))
