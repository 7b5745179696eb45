"""What every model is to the engine, whoever wrote its forward pass: ours, or transformers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.attention.contract import Batch, KvCache
from engine.model.logits import best_tokens


@dataclass(frozen=True, slots=True)
class Output:
    """What a pass gives for its `logit_rows`."""

    logits: Tensor  # [whole_rows, vocab_size], in the model's dtype or float32
    best: Tensor  # [R - whole_rows] int64, as `logits.best_tokens` has them

    @classmethod
    def of(cls, logits: Tensor, batch: Batch) -> Output:
        """From the logits of all rows, [R, vocab_size]."""
        whole = batch.whole_rows
        return cls(logits[:whole], best_tokens(logits[whole:]))


class PagedModel(Protocol):
    """A decoder-only transformer whose attention reads and writes a paged cache.

    Knows nothing about scheduling, sampling or text. Its attention backend is given when it is
    built.
    """

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        ...

    @property
    def layers(self) -> int:
        """Attention layers; each has its own keys and values in the cache."""
        ...

    @property
    def kv_heads(self) -> int:
        """Key and value heads per layer."""
        ...

    @property
    def head_dim(self) -> int:
        """Numbers per key or value head."""
        ...

    @property
    def max_context(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        ...

    def forward(self, batch: Batch, cache: KvCache) -> Output:
        """Run one pass under `torch.inference_mode`; writes the batch's KV into `cache`."""
        ...
