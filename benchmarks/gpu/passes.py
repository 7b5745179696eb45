"""Steady generation and full prompt passes: seconds, MBU, MFU, and how long the device waits."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch

from baton.types import Request, Sampling, Stopping
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.timing import Waiting, watched
from engine.bench.work import ModelCount, Part
from engine.gpu.executor import GpuExecutor
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence

_SETTLING = 4  # steps until generation runs steadily
_WATCHED = 16  # steps under torch's profiler, whose results take a while to read


@dataclass(frozen=True, slots=True)
class Shape:
    """A pass to time: `batch` sequences that generate at `context`, or prompts of `prompt` tokens
    that fill one pass."""

    batch: int = 1
    context: int = 0
    prompt: int = 0

    @property
    def parts(self) -> list[Part]:
        """What it costs, to count."""
        one = Part(0, self.prompt) if self.prompt else Part(self.context - 1, 1)
        return [one] * self.batch

    @property
    def name(self) -> str:
        """For people."""
        if self.prompt:
            return f"prompt {self.batch} x {self.prompt}"
        return f"generation {self.batch} x {self.context}"

    @property
    def tokens(self) -> int:
        """Tokens of the pass."""
        return sum(part.length for part in self.parts)

    def positions(self, steps: int) -> int:
        """What the longest sequence of a measurement comes to."""
        return self.prompt + 1 if self.prompt else _first(self, steps) + _more(steps)


@dataclass(frozen=True, slots=True)
class Timed:
    """Medians of one shape."""

    shape: Shape
    seconds: float
    mbu: float
    mfu: float
    gap: float | None  # share of a step of generation that the device alone does not need
    waiting: Waiting | None  # by torch's profiler; None where not looked at

    @property
    def floor_share(self) -> float:
        """Floor over measured: 1 is as fast as the device can be."""
        return max(self.mbu, self.mfu)


def fill(executor: GpuExecutor) -> None:
    """Random keys and values in the whole pool, so that what generation reads is like real KV."""
    pool = executor.pool
    for layer in range(executor.model.layers):
        for numbers in (pool.keys(layer), pool.values(layer)):
            for block in torch.split(numbers, 1024):
                block.copy_(torch.randn(block.shape, device=block.device).to(block.dtype))
        for scale in pool.scales(layer) or ():
            scale.fill_(0.01)


def measure(
    executor: GpuExecutor, shape: Shape, count: ModelCount, ceilings: Ceilings, *, steps: int = 40
) -> Timed:
    """Time one shape as a worker would run it: so many steps of generation, or a sixth as many
    passes over prompts."""
    took = seconds(executor, shape, steps)
    gap = found = None
    device = executor.pool.storage.device
    if not shape.prompt:
        gap = max(0.0, 1 - _chained(executor, shape, steps) / took)
    if not shape.prompt and device.type == "cuda":
        running = _generation(executor, shape, _WATCHED)
        next(running)
        found = watched(lambda: list(running), device)
    work = count.work(shape.parts)
    return Timed(
        shape,
        took,
        mbu=work.bytes / took / ceilings.read,
        mfu=work.operations / took / ceilings.bf16,
        gap=gap,
        waiting=found,
    )


def seconds(executor: GpuExecutor, shape: Shape, steps: int) -> float:
    """The median of so many steps of generation, or of a sixth as many passes over prompts."""
    if shape.prompt:
        return median(_prompts(executor, shape, max(1, steps // 6)))
    return median(_generation(executor, shape, steps))


def _first(shape: Shape, steps: int) -> int:
    """The context at which generation begins, so that its middle is the shape's."""
    return max(1, shape.context - (_SETTLING + steps) // 2)


def _more(steps: int) -> int:
    return _SETTLING + steps + 2


def _generation(executor: GpuExecutor, shape: Shape, steps: int) -> Iterator[float]:
    """Seconds of wall time from one step to the next, once it runs."""
    first = _first(shape, steps)
    sequences = [_sequence(executor, i, first, _more(steps)) for i in range(shape.batch)]
    ended = time.perf_counter()
    for step in range(_SETTLING + steps):
        chunks = tuple(Chunk(s, len(s.tokens) - 1, 1, sample=True) for s in sequences)
        result = executor.execute(StepPlan(chunks))
        for sequence, sampled in zip(sequences, result.sampled, strict=True):
            assert sampled is not None
            sequence.append(sampled.token_id)
        begun, ended = ended, time.perf_counter()
        if step >= _SETTLING:
            yield ended - begun


def _chained(executor: GpuExecutor, shape: Shape, steps: int) -> float:
    """Seconds of a step if passes are queued one behind the other, and the host looks at no token
    until the end."""
    first, rows = _first(shape, steps), list(range(shape.batch))
    sequences = [_sequence(executor, i, first, _more(steps)) for i in rows]
    launcher, device = executor._launcher, executor.pool.storage.device
    with torch.inference_mode():
        launched = launcher.chunks([Chunk(s, first - 1, 1, sample=True) for s in sequences])
        for step in range(_SETTLING + steps):
            if step == _SETTLING:
                _settle(device)
                begun = time.perf_counter()
            positions = [first + step] * shape.batch
            launched, _ = launcher.go_on(sequences, positions, launched.drawn.tokens, rows)
        launched.results()
    return (time.perf_counter() - begun) / steps


def _prompts(executor: GpuExecutor, shape: Shape, repeats: int) -> Iterator[float]:
    """Seconds of passes over fresh prompts, the first of which warms up."""
    for turn in range(repeats + 1):
        sequences = [_sequence(executor, i, shape.prompt, 1) for i in range(shape.batch)]
        chunks = tuple(Chunk(s, 0, shape.prompt, sample=True) for s in sequences)
        _settle(executor.pool.storage.device)
        begun = time.perf_counter()
        executor.execute(StepPlan(chunks))
        _settle(executor.pool.storage.device)
        if turn:
            yield time.perf_counter() - begun


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sequence(executor: GpuExecutor, index: int, tokens: int, more: int) -> Sequence:
    """A sequence of random tokens in blocks of its own, with room for `more`."""
    chooser = random.Random(index)
    ids = tuple(chooser.randrange(executor.model.vocab_size) for _ in range(tokens))
    request = Request(f"bench-{index}", ids, Sampling(), Stopping(max_tokens=more))
    sequence = Sequence.start(request, 0, now=0.0)
    width = executor.capacity.blocks_for(tokens + more)
    sequence.blocks = list(range(index * width, (index + 1) * width))
    sequence.computed = tokens - 1
    return sequence
