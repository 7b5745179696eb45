"""Passes in buckets, replayed over the same tensors: everywhere but for what CUDA does about it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.gpu import graphs
from tests.engine.gpu.test_executor import on_gpu, prompt, small

__all__ = ["on_gpu", "small"]

Make = Callable[..., Any]


def test_buckets_end_with_the_largest_batch() -> None:
    assert graphs.buckets(1) == [1]
    assert graphs.buckets(7) == [1, 2, 4, 7]
    assert graphs.buckets(64)[-3:] == [48, 56, 64]
    assert graphs.buckets(300)[-3:] == [240, 256, 300]


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Without a GPU, a graph is what computes the same once more, into the same tensor."""
    if device.type == "cuda":
        return

    class Graph(graphs._Graph):
        """Knows what was recorded."""

        def __init__(self, inputs: Any, model: Any, pool: Any, memory: Any) -> None:
            super().__init__(inputs, model, pool, memory)
            self._graph = SimpleNamespace(
                replay=lambda: self._logits.copy_(model.logits(inputs, None, pool))
            )

    def record(self: Any) -> None:
        for rows in graphs.buckets(self._most):
            self._graphs[rows] = Graph(self._static(rows), self._model, self._pool, None)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(graphs.DecodeGraphs, "record", record)


def test_sequences_that_end_one_by_one_go_through_every_bucket(
    small: Any, on_gpu: Make, recording: None
) -> None:
    driver = on_gpu(small.path)
    driver.executor.warm_up()
    assert not driver.executor.pool.storage.any()  # spare rows write nothing
    texts = [prompt(3 + i, i) for i in range(5)]
    sequences = [driver.add(text, 2 + i) for i, text in enumerate(texts)]
    driver.run()
    for text, sequence in zip(texts, sequences, strict=True):
        small.assert_generates(text, sequence.tokens[len(text) :])
