"""Measures what passes and swaps cost on this machine, and fits the simulator's cost model to it.

Passes of many shapes are run several times each, in shuffled order: the speed of a shared machine
changes from second to second, and must not be taken for a property of a shape. The KV that they
read is zeros, which costs the same as any.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import torch

from baton.types import Request, Sampling, Stopping
from engine.model.runner import TorchExecutor
from scheduling.cost import LinearCost, StepRecord
from scheduling.plan import Chunk, StepPlan, Swap
from scheduling.sequence import Sequence
from scheduling.simulator.profiles import Profile

_CHUNKS = (16, 64, 256, 512)  # tokens of a prompt chunk
_BATCHES = (1, 4, 16, 64)  # generating sequences
_POSITIONS = (0, 128, 512, 960)  # tokens before a chunk, or of context
_SWAPPED_BLOCKS = 64


@dataclass(frozen=True, slots=True)
class Fit:
    """A cost model and the passes behind it; `records` holds the median of each shape."""

    profile: Profile
    records: tuple[StepRecord, ...]

    @property
    def errors(self) -> list[float]:
        """How far the model is from each shape's median, as a share of that, without sign."""
        cost = self.profile.cost
        return [abs(cost.seconds(r.work) / r.seconds - 1) for r in self.records]

    @property
    def median_error(self) -> float:
        """The median of `errors`."""
        return statistics.median(self.errors)


def fit(
    executor: TorchExecutor,
    name: str,
    *,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Measure and fit. The executor must not be serving; its KV is overwritten."""
    executor.warm_up()
    records = _measure(executor, list(_shapes(executor)), repeats, progress)
    cost = LinearCost.fit(records)
    capacity, pool = executor.capacity, executor.pool
    progress("swaps")
    profile = Profile(
        name=name,
        base=cost.base,
        per_token=cost.per_token,
        per_attention=cost.per_attention,
        per_sequence=cost.per_sequence,
        per_context=cost.per_context,
        swap_seconds_per_block=_swap_seconds(executor, repeats) if capacity.host_blocks else 0.0,
        block_size=capacity.block_size,
        block_bytes=pool.block_bytes,
        blocks=capacity.blocks,
        max_context=capacity.max_context,
        source=f"measured on {pool.storage.device}, {torch.get_num_threads()} threads, "
        f"{pool.geometry.dtype}; KV transfer not measured",
    )
    return Fit(profile, tuple(records))


def _measure(
    executor: TorchExecutor,
    shapes: list[StepPlan],
    repeats: int,
    progress: Callable[[str], None],
) -> list[StepRecord]:
    """The median time of each shape."""
    seconds: list[list[float]] = [[] for _ in shapes]
    order = list(range(len(shapes)))
    chooser = random.Random(0)
    for turn in range(repeats + 1):  # the first is for caches to fill
        progress(f"{len(shapes)} shapes of passes, {turn} of {repeats}")
        chooser.shuffle(order)
        for place in order:
            result = executor.execute(shapes[place])
            if turn:
                seconds[place].append(result.seconds)
    medians = map(statistics.median, seconds)
    return [StepRecord.of(shape, median) for shape, median in zip(shapes, medians, strict=True)]


def _shapes(executor: TorchExecutor) -> Iterator[StepPlan]:
    """Prompt chunks at several places, batches of generation at several contexts, and both
    together, as far as the executor's limits go."""
    for start in _POSITIONS:
        for length in _CHUNKS:
            yield from _plan(executor, [(start, length)])
        for batch in _BATCHES:
            yield from _plan(executor, [(start + 15, 1)] * batch)
    for start in _POSITIONS[:2]:
        yield from _plan(executor, [(start, 64)] * 4)
        for batch in (4, 16):
            for length in (64, 256):
                yield from _plan(executor, [(start + 127, 1)] * batch + [(start, length)])


def _plan(executor: TorchExecutor, chunks: list[tuple[int, int]]) -> Iterator[StepPlan]:
    """A pass of chunks (start, length), each of a sequence of its own; nothing if it does not
    fit."""
    capacity = executor.capacity
    blocks = count()
    made: list[Chunk] = []
    for start, length in chunks:
        if start + length > capacity.max_context:
            return
        sequence = _sequence(executor, len(made), start + length)
        needed = capacity.blocks_for(start + length)
        sequence.blocks = [next(blocks) for _ in range(needed)]
        made.append(Chunk(sequence, start, length, sample=True))
    plan = StepPlan(tuple(made))
    fits = plan.tokens <= capacity.max_tokens and len(made) <= capacity.max_sequences
    if fits and next(blocks) <= capacity.blocks:
        yield plan


def _sequence(executor: TorchExecutor, index: int, tokens: int) -> Sequence:
    chooser = random.Random(index)
    ids = tuple(chooser.randrange(executor.model.vocab_size) for _ in range(tokens))
    return Sequence.start(Request(f"fit-{index}", ids, Sampling(), Stopping(1)), 0, now=0.0)


def _swap_seconds(executor: TorchExecutor, repeats: int) -> float:
    """Seconds per block, of the slower direction."""
    capacity = executor.capacity
    blocks = range(min(_SWAPPED_BLOCKS, capacity.blocks, capacity.host_blocks))
    sequence = _sequence(executor, 0, 1)
    swap = Swap(0, sequence, tuple(blocks), tuple(reversed(blocks)))
    ways = (StepPlan((), swap_out=(swap,)), StepPlan((), swap_in=(swap,)))
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats + 1):  # the first takes the memory
        for way, plan in enumerate(ways):
            seconds[way].append(executor.execute(plan).seconds)
    return max(statistics.median(way[1:]) for way in seconds) / len(blocks)
