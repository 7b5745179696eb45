"""How fast the machine is now, by a pass that is always the same.

Processors of shared machines slow down and speed up by half, from second to second, with what
their neighbours do. An order that happens to run while the machine is slow would look worse, and
the load would not be what it is said to be. So a reference pass runs every now and then between
the passes of a run, and their seconds are given as what they would have been at the pace of the
start.
"""

from __future__ import annotations

import statistics
import time
from collections import deque

from baton.types import Request, Sampling, Stopping
from engine.executor import Executor
from scheduling.plan import Chunk, StepPlan
from scheduling.sequence import Sequence

_CONTEXT = 48
_EVERY = 16  # passes


class Pace:
    """Times the reference pass: one token each of a full batch. It writes KV to the first blocks
    of the pool, which does no harm where tokens mean nothing."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        capacity = executor.capacity
        width = capacity.blocks_for(_CONTEXT)
        count = min(capacity.max_sequences, capacity.blocks // width)
        self._plan = StepPlan(tuple(_chunk(number, width) for number in range(count)))
        self._usual = statistics.median(self._time() for _ in range(64))
        self._recent: deque[float] = deque(maxlen=5)
        self._passes = 0

    @property
    def factor(self) -> float:
        """What a second of now was at the start: below 1 while the machine is slower."""
        return self._usual / statistics.median(self._recent) if self._recent else 1.0

    def tick(self) -> tuple[int, ...]:
        """A pass is about to run. Returns the swaps that a reference pass, if it was time for
        one, reported as complete."""
        self._passes += 1
        if self._passes % _EVERY != 1:
            return ()
        started = time.thread_time()
        result = self._executor.execute(self._plan)
        self._recent.append(time.thread_time() - started)
        return result.swapped

    def _time(self) -> float:
        started = time.thread_time()
        self._executor.execute(self._plan)
        return time.thread_time() - started


def _chunk(number: int, width: int) -> Chunk:
    request = Request(f"pace{number}", (0,) * _CONTEXT, Sampling(), Stopping(max_tokens=1))
    sequence = Sequence.start(request, 0, now=0.0)
    sequence.blocks = list(range(number * width, (number + 1) * width))
    return Chunk(sequence, _CONTEXT - 1, 1, sample=True)
