"""Passes of many shapes, timed on one executor or on several in turn.

Every shape is run several times, in shuffled order, one executor right after the other: the speed
of a shared machine changes from second to second, and must not be taken for a property of a shape
or of an executor. The KV that passes read is zeros, which costs the same as any.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import Literal

from baton.types import Request, Sampling, Stopping
from engine.bench.work import Part
from engine.model.runner import TorchExecutor
from scheduling.cost import StepRecord
from scheduling.plan import Capacity, Chunk, StepPlan
from scheduling.sequence import Sequence as Running

Kind = Literal["prompt", "generation", "mixed"]
Progress = Callable[[str], None]

CHUNKS = (16, 32, 64, 128, 256, 512)  # tokens of a prompt chunk
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # generating sequences
CONTEXTS = (128, 512, 1024, 2048)  # positions that a generated token attends to, itself among them
_STARTS = (0, 512, 1536)  # tokens before a prompt chunk


@dataclass(frozen=True, slots=True)
class PassShape:
    """What is in a pass: (start, length) of each sequence's chunk. All of them sample."""

    kind: Kind
    chunks: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """Tokens of the pass."""
        return sum(length for _, length in self.chunks)

    @property
    def batch(self) -> int:
        """Sequences in the pass."""
        return len(self.chunks)

    @property
    def context(self) -> int:
        """Positions of the longest sequence after the pass."""
        return max(start + length for start, length in self.chunks)

    @property
    def parts(self) -> list[Part]:
        """What it costs, to count (work.py)."""
        return [Part(start, length) for start, length in self.chunks]

    def fits(self, capacity: Capacity) -> bool:
        """Whether an executor has room for it."""
        blocks = sum(capacity.blocks_for(part.end) for part in self.parts)
        return (
            self.tokens <= capacity.max_tokens
            and self.batch <= capacity.max_sequences
            and self.context <= capacity.max_context
            and blocks <= capacity.blocks
        )

    def plan(self, executor: TorchExecutor) -> StepPlan:
        """The pass, over the executor's first blocks."""
        blocks = count()
        chunks = []
        for index, (start, length) in enumerate(self.chunks):
            sequence = sequence_of(executor, index, start + length)
            needed = executor.capacity.blocks_for(start + length)
            sequence.blocks = [next(blocks) for _ in range(needed)]
            chunks.append(Chunk(sequence, start, length, sample=True))
        return StepPlan(tuple(chunks))


@dataclass(frozen=True, slots=True)
class TimedPass:
    """A shape, the median of its times with the work that a cost model is fitted to, and the
    shortest of them: what it takes while nobody else has the machine."""

    shape: PassShape
    record: StepRecord
    fastest: float

    @property
    def seconds(self) -> float:
        """The median."""
        return self.record.seconds


def shapes(capacity: Capacity) -> list[PassShape]:
    """Prompt chunks at several places, batches of generation at several contexts, and both
    together, as far as the limits go."""
    return [shape for shape in _every_shape() if shape.fits(capacity)]


def time_passes(
    executors: Sequence[TorchExecutor],
    wanted: Sequence[PassShape],
    *,
    repeats: int,
    progress: Progress = lambda line: None,
) -> list[list[TimedPass]]:
    """For each executor, every shape with its median. The executors must not be serving."""
    plans = [[shape.plan(executor) for shape in wanted] for executor in executors]
    seconds: list[list[list[float]]] = [[[] for _ in wanted] for _ in executors]
    order = list(range(len(wanted)))
    chooser = random.Random(0)
    with ExitStack() as stack:
        # A thread for each executor: torch keeps the number of its threads per calling thread.
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in executors]
        for turn in range(repeats + 1):  # the first is for caches to fill
            chooser.shuffle(order)
            for done, place in enumerate(order):
                progress(f"pass {done + 1} of {len(wanted)}, round {turn} of {repeats}")
                for which, executor in enumerate(executors):
                    result = threads[which].submit(executor.execute, plans[which][place]).result()
                    if turn:
                        seconds[which][place].append(result.seconds)
    return [
        [
            TimedPass(shape, StepRecord.of(plan, statistics.median(found)), min(found))
            for shape, plan, found in zip(wanted, mine, taken, strict=True)
        ]
        for mine, taken in zip(plans, seconds, strict=True)
    ]


def sequence_of(executor: TorchExecutor, index: int, tokens: int) -> Running:
    """A sequence of so many random tokens, without blocks."""
    ids = _tokens(executor.model.vocab_size, executor.capacity.max_context)[:tokens]
    return Running.start(Request(f"bench-{index}", ids, Sampling(), Stopping(1)), 0, now=0.0)


@cache
def _tokens(vocabulary: int, most: int) -> tuple[int, ...]:
    chooser = random.Random(0)
    return tuple(chooser.randrange(vocabulary) for _ in range(most))


def _every_shape() -> Iterator[PassShape]:
    for start in _STARTS:
        for length in CHUNKS:
            yield PassShape("prompt", ((start, length),))
    for context in (16, *CONTEXTS):
        for batch in BATCHES:
            yield PassShape("generation", ((context - 1, 1),) * batch)
    for start in _STARTS[:2]:
        yield PassShape("prompt", ((start, 64),) * 4)
        for batch in (4, 16):
            for length in (64, 256):
                chunks = ((start + 127, 1),) * batch + ((start, length),)
                yield PassShape("mixed", chunks)
