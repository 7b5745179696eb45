"""Gives passes to the device and does not wait for them."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from baton.types import Logprob
from engine.attention.contract import Batch
from engine.gpu.choice import DeviceChoice
from engine.gpu.graphs import DecodeGraphs, DecodeRows
from engine.gpu.kernels.blocks import clear
from engine.gpu.model import GpuLlama
from engine.gpu.transfer import Arriving, Stopwatch, to_device
from engine.model.batch import ChunkRows, begun_blocks, build_batch
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
            rows = self._rows(sampling, [chunk.start for chunk in chunks])
            logits = self._graphs.run(rows, to_device(ids, self._device))
            return self._choose(chunks, sampling, logits)
        batch, places = build_batch(plan, self._pool.block_size)
        batch = _on_device(batch, self._device)
        logits = self._model.logits(self._model.inputs(batch), batch.logit_rows, self._pool)
        if any(place.prompt for place in places):
            return Looked(self._look(chunks, places, batch, logits))
        order = [
            _row(place, batch.whole_rows)
            for place in places
            if place.sample is not None or place.best is not None
        ]
        if order != list(range(len(order))):
            logits = logits[to_device(np.array(order), self._device)]
        return self._choose(chunks, sampling, logits)

    def goes_on(self, count: int) -> bool:
        """Whether `go_on` takes so many sequences."""
        return self._graphs.holds(count)

    def go_on(
        self, sequences: list[Sequence], positions: list[int], tokens: Tensor, sources: list[int]
    ) -> tuple[Launched, Stopwatch]:
        """A pass over one token of each sequence, at these positions: `tokens[sources]`, which only
        the device knows."""
        size = self._pool.block_size
        begun = [
            s.blocks[p // size] for s, p in zip(sequences, positions, strict=True) if not p % size
        ]
        self._clear(begun)
        watch = Stopwatch(self._device)
        ids = tokens[to_device(np.array(sources), self._device)]
        logits = self._graphs.run(self._rows(sequences, positions), ids)
        chunks = [Chunk(s, p, 1, sample=True) for s, p in zip(sequences, positions, strict=True)]
        offset = [p + 1 for p in positions]
        launched = Launched(chunks, self._choice.draw(logits, sequences, offset), sequences)
        watch.stop()
        return launched, watch

    def _choose(self, chunks: list[Chunk], sequences: list[Sequence], logits: Tensor) -> Launched:
        if all(map(samples_on_device, sequences)):
            lengths = [len(sequence.tokens) for sequence in sequences]
            return Launched(chunks, self._choice.draw(logits, sequences, lengths), sequences)
        tokens = iter(sample(logits, sequences, self._choice))
        return Looked([(next(tokens) if chunk.sample else None, ()) for chunk in chunks])

    def _look(
        self, chunks: list[Chunk], places: tuple[ChunkRows, ...], batch: Batch, logits: Tensor
    ) -> list[Result]:
        """Sample, and read the prompt logprobs, now."""
        sampling = [c.sequence for c in chunks if c.sample]
        order = [_row(p, batch.whole_rows) for c, p in zip(chunks, places, strict=True) if c.sample]
        tokens = iter(sample(logits[order], sampling, self._choice) if order else ())
        return [
            (next(tokens) if chunk.sample else None, prompt_logprobs_of(chunk, place, logits))
            for chunk, place in zip(chunks, places, strict=True)
        ]

    def _clear(self, blocks: list[int]) -> None:
        """Zero these blocks, before a sequence begins to fill them."""
        if blocks:
            clear(self._pool.storage, to_device(np.array(blocks), self._device))

    def _rows(self, sequences: list[Sequence], positions: list[int]) -> DecodeRows:
        """Where these tokens stand and what they see."""
        size = self._pool.block_size
        at = np.array(positions)
        counts = at // size + 1
        tables = np.zeros((len(sequences), int(counts.max())), dtype=np.int32)
        for row, (sequence, count) in enumerate(zip(sequences, counts.tolist(), strict=True)):
            tables[row, :count] = sequence.blocks[:count]
        last = tables[np.arange(len(at)), at // size].astype(np.int64)
        return DecodeRows(positions=at, slots=last * size + at % size, tables=tables)


def _row(place: ChunkRows, whole_rows: int) -> int:
    """The row of logits that a chunk samples from."""
    if place.sample is not None:
        return place.sample
    assert place.best is not None
    return whole_rows + place.best


def _on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device."""

    def moved(tensor: Tensor) -> Tensor:
        return to_device(tensor.numpy(), device)

    return replace(
        batch,
        token_ids=moved(batch.token_ids),
        positions=moved(batch.positions),
        slots=moved(batch.slots),
        block_tables=moved(batch.block_tables),
        logit_rows=moved(batch.logit_rows),
    )
