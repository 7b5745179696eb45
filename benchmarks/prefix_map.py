"""What knowing prefixes costs a gateway, per request and in memory.

    python benchmarks/prefix_map.py

Microseconds of its own CPU time, so other load on the machine counts little: for a prompt that
begins with an earlier one, of which every worker has a part.
"""

from __future__ import annotations

import random
import statistics
import time
import tracemalloc
from collections.abc import Callable

from scheduling.prefix_map import PrefixMap, PromptKeys

BLOCK_SIZE = 16
SHARED = 1000  # tokens that all prompts begin with
ROUNDS = 300
ROOM = 4096  # blocks of each worker
TENANT = "tenant"


def median_microseconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    taken = []
    for _ in range(ROUNDS):
        began = time.process_time_ns()
        work()
        taken.append(time.process_time_ns() - began)
    return statistics.median(taken) / 1e3


def run(workers: int, length: int) -> None:
    """One line."""
    rng = random.Random(0)
    shared = [rng.randrange(100_000) for _ in range(SHARED)]

    def prompt() -> list[int]:
        return shared + [rng.randrange(100_000) for _ in range(length - SHARED)]

    tracemalloc.start()
    known = PrefixMap()
    names = [f"decode-{number}" for number in range(workers)]
    known.workers(dict.fromkeys(names, (1, ROOM)))
    for count, name in enumerate(names, 1):
        while len(known) < count * ROOM:
            known.note(name, 1, PromptKeys(prompt(), TENANT).of(BLOCK_SIZE), 0.0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    one = prompt()
    keys = PromptKeys(one, TENANT).of(BLOCK_SIZE)
    hashing = median_microseconds(lambda: PromptKeys(one, TENANT).of(BLOCK_SIZE))
    looking = median_microseconds(lambda: known.cached(keys))
    noting = median_microseconds(lambda: known.note(names[0], 1, keys, 0.0))
    print(
        f"{workers:4} workers, {length:5} tokens: hash {hashing:6.0f} us, look {looking:6.1f} us, "
        f"note {noting:6.1f} us; {held / len(known):4.0f} bytes per key"
    )


if __name__ == "__main__":
    for count in (4, 32):
        for tokens in (2000, 8000):
            run(count, tokens)
