"""How a worker wants its model run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What decides who runs the model and in which formats; fields as in WorkerConfig."""

    attention_backend: str
    dtype: str
    device: str
    quantization: str
    kv_dtype: str
    instruction_set: str
    threads: int
    block_size: int
    max_batch_tokens: int
    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def ranks(self) -> int:
        """Processes that compute the model together."""
        return self.tensor_parallel * self.pipeline_parallel
