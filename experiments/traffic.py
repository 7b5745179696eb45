"""What arrives in an experiment: lengths alone, prompts that tell of lengths, the demo's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from scheduling.simulator.topics import Topics
from scheduling.simulator.traffic import Arrivals, Job, Lengths, make_jobs

_DEMO = Path(__file__).parent / "data" / "demo_lengths.json"


@dataclass(frozen=True, slots=True)
class Traffic:
    """`jobs(arrivals, count, seed)`: by arrival, without estimates; another rate leaves their
    lengths as they are. `longest`: no output is longer. `name` identifies it."""

    name: str
    jobs: Callable[[Arrivals, int, int], list[Job]]
    longest: int


def of_lengths(lengths: Lengths) -> Traffic:
    """Lengths from distributions, and prompts that tell nothing."""

    def jobs(arrivals: Arrivals, count: int, seed: int) -> list[Job]:
        return make_jobs(lengths, arrivals, count, seed=seed)

    return Traffic(lengths.name, jobs, lengths.max_total)


def of_topics(topics: Topics) -> Traffic:
    """The same distributions, and prompts whose words tell something of the length."""

    def jobs(arrivals: Arrivals, count: int, seed: int) -> list[Job]:
        return topics.jobs(arrivals, count, seed=seed)

    name = f"{topics.lengths.name}, {topics.predictability:.0%} predictable"
    return Traffic(name, jobs, topics.lengths.max_total)


def of_demo() -> Traffic:
    """Questions that the demo model was asked, drawn with replacement, and how long its greedy
    answers were. The scheduler sees the cap that they were generated with."""
    questions, cap = _demo_questions()

    def jobs(arrivals: Arrivals, count: int, seed: int) -> list[Job]:
        of_questions, of_times = (
            np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(2)
        )
        chosen = of_questions.integers(len(questions), size=count).tolist()
        times = arrivals(of_times, count).tolist()
        return [
            Job(
                id=f"r{number:07d}",
                arrived_at=time,
                prompt_tokens=len(questions[which][0]),
                output_tokens=questions[which][1],
                max_tokens=cap,
                prompt_ids=questions[which][0],
            )
            for number, (which, time) in enumerate(zip(chosen, times, strict=True))
        ]

    return Traffic("demo model", jobs, cap)


@lru_cache(maxsize=1)
def _demo_questions() -> tuple[list[tuple[tuple[int, ...], int]], int]:
    """(prompt ids, output tokens) of each question, and the cap."""
    kept = json.loads(_DEMO.read_text())
    return [(tuple(r["prompt_ids"]), r["output_tokens"]) for r in kept["requests"]], kept[
        "max_tokens"
    ]
