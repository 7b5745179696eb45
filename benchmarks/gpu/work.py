"""Lists of requests to serve."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt and how many tokens follow it."""

    prompt: tuple[int, ...]
    output: int


def jobs(count: int, vocabulary: int, *, prompt: int, output: int, seed: int = 0) -> list[Job]:
    """Prompts of half to one and a half times this length, and outputs of one length, as
    transformers' interface has it."""
    chooser = random.Random(seed)

    def tokens() -> tuple[int, ...]:
        length = chooser.randrange(max(1, prompt // 2), prompt * 3 // 2 + 1)
        return tuple(chooser.randrange(3, vocabulary) for _ in range(length))

    return [Job(tokens(), output) for _ in range(count)]
