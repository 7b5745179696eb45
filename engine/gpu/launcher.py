"""Gives passes to the device and does not wait for them."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from baton.types import Logprob
from engine.attention.contract import Batch
from engine.gpu.graphs import DecodeRows
from engine.gpu.model import GpuLlama
from engine.gpu.passes import Passes
from engine.gpu.sampler import DeviceSampler, Drawn
from engine.gpu.transfer import Stopwatch, to_device
from engine.model.batch import BatchBuilder, ChunkRows
from engine.model.pool import KvPool
from engine.model.runner import prompt_logprobs_of
from scheduling.plan import Capacity, Chunk, Sampled, StepPlan
from scheduling.sequence import Sequence

Result = tuple[Sampled | None, tuple[Logprob, ...]]


class Launched:
    """A pass that the device computes."""

    def __init__(
        self, chunks: Items[Chunk], drawn: Drawn, prompt: Items[tuple[Logprob, ...]] = ()
    ) -> None:
        """`drawn` are the tokens of the chunks that sample; `prompt` the logprobs of each chunk's
        prompt tokens, which are there already, nothing if nobody wants any."""
        self.drawn = drawn
        self._chunks = chunks
        self._prompt = prompt or [()] * len(chunks)

    def results(self) -> list[Result]:
        """What each chunk gets, when it is there."""
        tokens = iter(self.drawn.sampled())
        pairs = zip(self._chunks, self._prompt, strict=True)
        return [(next(tokens) if chunk.sample else None, found) for chunk, found in pairs]


class Others(Protocol):
    """Processes that launch the same passes over their shards of the model, in the same order
    (engine/parallel/lockstep.py). They are told before this one launches its share."""

    def record(self) -> None:
        """Have them record their graphs."""
        ...

    def batch(self, batch: Batch) -> None:
        """Tell them of a pass, which lies in host memory."""
        ...

    def rows(self, rows: DecodeRows, token_ids: NDArray[np.int64] | None) -> None:
        """Tell them of a generation pass; of tokens that the host does not know, `tokens` tells."""
        ...

    def tokens(self, token_ids: Tensor) -> Tensor:
        """`token_ids` [n] int64, which they have now, too."""
        ...

    def logits(self, logits: Tensor) -> Tensor:
        """All columns of the logits, of which these are the first shard's: [n, vocab_size]."""
        ...


class Nobody:
    """The Others of a model in one process."""

    def record(self) -> None:
        """Nobody to tell."""

    def batch(self, batch: Batch) -> None:
        """Nobody to tell."""

    def rows(self, rows: DecodeRows, token_ids: NDArray[np.int64] | None) -> None:
        """Nobody to tell."""

    def tokens(self, token_ids: Tensor) -> Tensor:
        """As they are."""
        return token_ids

    def logits(self, logits: Tensor) -> Tensor:
        """All of them."""
        return logits


class Launcher:
    """Passes of one model over one pool, and what is drawn from their logits. They run in the order
    in which they are given."""

    def __init__(
        self,
        model: GpuLlama,
        pool: KvPool,
        capacity: Capacity,
        batches: BatchBuilder,
        others: Others | None = None,
    ) -> None:
        """`others`: where the model is one of several shards."""
        self._batches, self._block_size = batches, pool.block_size
        self._others = others or Nobody()
        self._device = pool.storage.device
        most = capacity.max_sequences * capacity.depth
        self._sampler = DeviceSampler(model.vocab_size, most, self._device)
        self._passes = Passes(model, pool, capacity)

    def record(self) -> None:
        """Record the graphs of generation passes."""
        self._others.record()
        self._passes.record()

    def chunks(self, chunks: list[Chunk]) -> Launched:
        """A pass over tokens that the host knows."""
        plan = StepPlan(tuple(chunks))
        singles = plan.tokens == len(chunks) and all(chunk.sample for chunk in chunks)
        if singles and self._passes.holds(len(chunks)):
            ids = np.array([chunk.sequence.tokens[chunk.start] for chunk in chunks])
            rows = self._rows(plan.chunks)
            self._others.rows(rows, ids)
            logits = self._others.logits(self._passes.rows(rows, to_device(ids, self._device)))
            return Launched(chunks, self._draw(chunks, logits))
        batch, places = self._batches.build(plan)
        self._others.batch(batch)
        logits = self._others.logits(self._passes.batch(batch))
        prompt = [
            prompt_logprobs_of(chunk, place, logits)
            for chunk, place in zip(chunks, places, strict=True)
        ]
        pairs = zip(chunks, places, strict=True)
        order = [_row(place, batch.whole_rows) for chunk, place in pairs if chunk.sample]
        if order != list(range(len(logits))):
            logits = logits[to_device(np.array(order, dtype=np.int64), self._device)]
        return Launched(chunks, self._draw(chunks, logits), prompt)

    def goes_on(self, count: int) -> bool:
        """Whether `go_on` takes so many sequences."""
        return self._passes.holds(count)

    def go_on(
        self, sequences: list[Sequence], positions: list[int], tokens: Tensor, sources: list[int]
    ) -> tuple[Launched, Stopwatch]:
        """A pass over one token of each sequence, at these positions: `tokens[sources]`, which only
        the device knows."""
        pairs = zip(sequences, positions, strict=True)
        chunks = tuple(Chunk(sequence, at, 1, sample=True) for sequence, at in pairs)
        watch = Stopwatch(self._device)
        rows = self._rows(chunks)
        self._others.rows(rows, None)
        ids = self._others.tokens(tokens[to_device(np.array(sources), self._device)])
        logits = self._others.logits(self._passes.rows(rows, ids))
        lengths = [at + 1 for at in positions]
        launched = Launched(chunks, self._sampler.draw(logits, sequences, lengths, ids))
        watch.stop()
        return launched, watch

    def _draw(self, chunks: list[Chunk], logits: Tensor) -> Drawn:
        """The tokens of the chunks that sample, whose logits these are: [S, vocab_size]."""
        sequences = [chunk.sequence for chunk in chunks if chunk.sample]
        return self._sampler.draw(logits, sequences, [len(s.tokens) for s in sequences])

    def _rows(self, chunks: tuple[Chunk, ...]) -> DecodeRows:
        """Where the tokens of these chunks, one each, stand and what they see."""
        at = np.array([chunk.start for chunk in chunks])
        tables = self._batches.tables(chunks)
        return DecodeRows.at(at, tables.astype(np.int32), self._block_size)


def _row(place: ChunkRows, whole_rows: int) -> int:
    """The row of logits that a chunk samples from."""
    if place.sample is not None:
        return place.sample
    assert place.best is not None
    return whole_rows + place.best
