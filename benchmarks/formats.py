"""The number formats whose accuracy is measured (accuracy.py), and the demo model in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import demo_model
from benchmarks.device_products import GROUP_SIZE, replace_products
from engine.bench.backends import backend_of
from engine.load import load_executor
from engine.model.llama import Llama
from engine.model.runner import TorchExecutor
from engine.model.weights import Checkpoint


@dataclass(frozen=True, slots=True)
class Format:
    """Of weights, activations where they are quantized, and KV where it has another than theirs."""

    name: str
    backend: str  # as load_executor wants it
    options: dict[str, Any]  # of load_executor
    products: str | None = None  # a GPU's, computed in torch (device_products.py)

    def load(self, **options: Any) -> TorchExecutor:
        """The demo model; `options` are others of load_executor."""
        path = demo_model.path()
        executor = load_executor(path, attention_backend=self.backend, **self.options, **options)
        if self.products is not None:
            assert isinstance(executor.model, Llama)
            checkpoint = Checkpoint(path, getattr(torch, self.options["dtype"]))
            replace_products(executor.model, checkpoint, self.products)
        return executor

    def backend_of(self, executor: TorchExecutor) -> str:
        """What ran it, as people read it."""
        return backend_of(executor) if self.products is None else "torch, as on GPUs"


_FLOAT32, _BFLOAT16 = {"dtype": "float32"}, {"dtype": "bfloat16"}
_KV_INT8, _KV_FP8 = {"kv_dtype": "int8"}, {"kv_dtype": "fp8"}
_INT8, _INT4 = _BFLOAT16 | {"quantization": "int8"}, _BFLOAT16 | {"quantization": "int4"}

# The first is what the others are compared with.
FORMATS = (
    Format("float32", "torch", _FLOAT32),
    Format("float32", "auto", _FLOAT32),
    Format("float32, KV int8", "torch", _FLOAT32 | _KV_INT8),
    Format("float32, KV int8", "auto", _FLOAT32 | _KV_INT8),
    Format("float32, KV fp8", "torch", _FLOAT32 | _KV_FP8),
    Format("bfloat16", "auto", _BFLOAT16),
    Format("bfloat16, KV int8", "auto", _BFLOAT16 | _KV_INT8),
    Format("int8 weights and activations", "auto", _INT8),
    Format("int8 weights and activations, KV int8", "auto", _INT8 | _KV_INT8),
    Format("int4 weights in groups of 32, int8 activations", "auto", _INT4),
    Format("int4 weights in groups of 32, int8 activations, KV int8", "auto", _INT4 | _KV_INT8),
    Format("bfloat16", "torch", _BFLOAT16),
    Format("bfloat16, KV int8", "torch", _BFLOAT16 | _KV_INT8),
    Format("bfloat16, KV fp8", "torch", _BFLOAT16 | _KV_FP8),
    Format("int8 weights only", "torch", _BFLOAT16, "int8"),
    Format(f"int4 weights only, in groups of {GROUP_SIZE}", "torch", _BFLOAT16, "int4"),
    Format("fp8 weights only", "torch", _BFLOAT16, "fp8"),
    Format("fp8 weights and activations", "torch", _BFLOAT16, "fp8 activations"),
    Format("fp8 weights and activations, KV fp8", "torch", _BFLOAT16 | _KV_FP8, "fp8 activations"),
)
