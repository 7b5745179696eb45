"""Gives passes to the device and does not wait for them."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
from torch import Tensor

from baton.types import Logprob
from engine.gpu.choice import DeviceChoice
from engine.gpu.graphs import DecodeGraphs, DecodeRows
from engine.gpu.kernels.blocks import clear
from engine.gpu.model import GpuLlama
from engine.gpu.transfer import Arriving, Stopwatch, batch_to_device, to_device
from engine.model.batch import BatchBuilder, ChunkRows, begun_blocks
from engine.model.logits import needs_adjustment
from engine.model.pool import KvPool
from engine.model.runner import prompt_logprobs_of
from engine.model.sampler import pick, sample
from scheduling.plan import Capacity, Chunk, Sampled, StepPlan
from scheduling.sequence import Sequence

Result = tuple[Sampled | None, tuple[Logprob, ...]]


def samples_on_device(sequence: Sequence) -> bool:
    """Whether its tokens can be drawn without the host: no logprobs, penalties or constraints."""
    return sequence.request.logprobs is None and not needs_adjustment(sequence)


class Launched:
    """A pass that the device computes."""

    def __init__(self, chunks: Items[Chunk], tokens: Tensor, sequences: list[Sequence]) -> None:
        """`tokens` [S] int64: those of `sequences`, the ones that sample, on the device."""
        self.tokens: Tensor | None = tokens
        self._sequences = sequences
        self._chunks = chunks
        self._arriving = Arriving(tokens)

    def sampled(self) -> list[Sampled]:
        """The tokens of the sequences, when they are there."""
        return pick(self._arriving.wait(), self._sequences)

    def results(self) -> list[Result]:
        """What each chunk gets."""
        tokens = iter(self.sampled())
        return [(next(tokens) if chunk.sample else None, ()) for chunk in self._chunks]


class Looked(Launched):
    """A pass whose logits the host had to look at: it is over."""

    def __init__(self, results: list[Result]) -> None:
        self.tokens = None
        self._results = results

    def sampled(self) -> list[Sampled]:
        """The tokens of the sequences that sample."""
        return [token for token, _ in self._results if token is not None]

    def results(self) -> list[Result]:
        """What each chunk gets."""
        return self._results


class Launcher:
    """One model and one pool. Passes run in the order in which they are given."""

    def __init__(self, model: GpuLlama, pool: KvPool, capacity: Capacity) -> None:
        self._model, self._pool = model, pool
        self._device = pool.storage.device
        self._choice = DeviceChoice(self._device)
        self._batches = BatchBuilder(pool.block_size)
        self._graphs = DecodeGraphs(model, pool, capacity)

    def record(self) -> None:
        """Record the graphs of generation passes."""
        self._graphs.record()

    def chunks(self, chunks: list[Chunk]) -> Launched:
        """A pass over tokens that the host knows."""
        plan = StepPlan(tuple(chunks))
        self._clear(begun_blocks(plan, self._pool.block_size))
        sampling = [chunk.sequence for chunk in chunks if chunk.sample]
        if len(sampling) == len(chunks) == plan.tokens and self._graphs.holds(len(chunks)):
            ids = np.array([chunk.sequence.tokens[chunk.start] for chunk in chunks])
            logits = self._graphs.run(self._rows(plan.chunks), to_device(ids, self._device))
            return self._choose(chunks, sampling, logits)
        batch, places = self._batches.build(plan)
        batch = batch_to_device(batch, self._device)
        logits = self._model.logits(self._model.inputs(batch), batch.logit_rows, self._pool)
        prompt = [
            prompt_logprobs_of(chunk, place, logits)
            for chunk, place in zip(chunks, places, strict=True)
        ]
        pairs = zip(chunks, places, strict=True)
        order = [_row(place, batch.whole_rows) for chunk, place in pairs if chunk.sample]
        if order != list(range(len(logits))):
            logits = logits[to_device(np.array(order, dtype=np.int64), self._device)]
        return self._choose(chunks, sampling, logits, prompt)

    def goes_on(self, count: int) -> bool:
        """Whether `go_on` takes so many sequences."""
        return self._graphs.holds(count)

    def go_on(
        self, sequences: list[Sequence], positions: list[int], tokens: Tensor, sources: list[int]
    ) -> tuple[Launched, Stopwatch]:
        """A pass over one token of each sequence, at these positions: `tokens[sources]`, which only
        the device knows."""
        pairs = zip(sequences, positions, strict=True)
        chunks = tuple(Chunk(sequence, at, 1, sample=True) for sequence, at in pairs)
        self._clear(begun_blocks(StepPlan(chunks), self._pool.block_size))
        watch = Stopwatch(self._device)
        ids = tokens[to_device(np.array(sources), self._device)]
        logits = self._graphs.run(self._rows(chunks), ids)
        lengths = [at + 1 for at in positions]
        launched = Launched(chunks, self._choice.draw(logits, sequences, lengths), sequences)
        watch.stop()
        return launched, watch

    def _choose(
        self,
        chunks: list[Chunk],
        sequences: list[Sequence],
        logits: Tensor,
        prompt: Items[tuple[Logprob, ...]] = (),
    ) -> Launched:
        """The tokens of the sequences, those of the chunks that sample, from their logits [S,
        vocab_size]: on the device, unless somebody wants more than tokens."""
        if not any(prompt) and all(map(samples_on_device, sequences)):
            lengths = [len(sequence.tokens) for sequence in sequences]
            return Launched(chunks, self._choice.draw(logits, sequences, lengths), sequences)
        tokens = iter(sample(logits, sequences, self._choice) if sequences else ())
        logprobs = prompt or [()] * len(chunks)
        pairs = zip(chunks, logprobs, strict=True)
        return Looked([(next(tokens) if chunk.sample else None, found) for chunk, found in pairs])

    def _clear(self, blocks: list[int]) -> None:
        """Zero these blocks, before a sequence begins to fill them."""
        if blocks:
            clear(self._pool.storage, to_device(np.array(blocks), self._device))

    def _rows(self, chunks: tuple[Chunk, ...]) -> DecodeRows:
        """Where the tokens of these chunks, one each, stand and what they see."""
        size = self._pool.block_size
        at = np.array([chunk.start for chunk in chunks])
        tables = self._batches.tables(chunks)
        last = tables[np.arange(len(at)), at // size]
        return DecodeRows(at, last * size + at % size, tables.astype(np.int32))


def _row(place: ChunkRows, whole_rows: int) -> int:
    """The row of logits that a chunk samples from."""
    if place.sample is not None:
        return place.sample
    assert place.best is not None
    return whole_rows + place.best
