"""The two benches that most experiments stand on: an engine with lengths and sizes to suit it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from experiments.engines import Engine, Setup, SimulatedEngine
from experiments.experiment import Run
from experiments.traffic import Traffic, of_topics
from scheduling.cost import LinearCost
from scheduling.order import make_policy
from scheduling.plan import Capacity
from scheduling.simulator.topics import Topics
from scheduling.simulator.traffic import SHAREGPT, Job, Lengths, LogNormal, offline

T = TypeVar("T")

OPT_13B_ON_A100 = LinearCost(
    base=0.0181, per_token=0.000102, per_attention=7.1e-9, per_sequence=3.85e-5, per_context=6.3e-7
)
"""After DistServe's published profile of OPT-13B on one A100-80G."""

SCALED_SHAREGPT = Lengths("sharegpt / 8", LogNormal(40, 1.6), LogNormal(42, 1.1), 200, 384)
"""ShareGPT-like outputs at an eighth of their length, so that a run takes seconds. Prompts at a
quarter: beside the passes of generation they then take about as long as on the A100."""


PREDICTABILITY = 0.85
"""Share of the variance of the logarithm of the output length that a prompt's topic explains."""


@dataclass(frozen=True, slots=True)
class Bench:
    """`traffic`: ShareGPT-like. `scale`: how many times shorter than ShareGPT's its outputs are.
    `count`: jobs of one run; `backlog`: at least so many of them measure saturation."""

    engine: Engine
    traffic: Traffic
    scale: float
    count: int
    backlog: int

    @property
    def second(self) -> float:
        """What a second is to OPT-13B on an A100: as many passes here, at this scale."""
        return self.engine.step_seconds / self.scale / _A100_STEP


def bench(run: Run) -> Bench:
    """The bench of a run, made once."""
    return run.once("bench", lambda: _real(run) if run.engine == "real" else _simulated(run))


def _simulated(run: Run) -> Bench:
    capacity = Capacity(
        blocks=1 << 17, block_size=16, max_tokens=2048, max_sequences=16, max_context=2049
    )
    engine = SimulatedEngine(OPT_13B_ON_A100, capacity)
    return Bench(
        engine, _sharegpt(SHAREGPT, 32_000), 1.0, run.sized(3000, 300), run.sized(8000, 2000)
    )


def _real(run: Run) -> Bench:
    from experiments.real import VOCABULARY, tiny_llama  # imports torch

    return Bench(
        tiny_llama(),
        _sharegpt(SCALED_SHAREGPT, VOCABULARY),
        8.0,
        run.sized(800, 150),
        run.sized(4000, 300),
    )


def _sharegpt(lengths: Lengths, vocabulary: int) -> Traffic:
    return of_topics(
        Topics(PREDICTABILITY, lengths, topics=100, words=30, share=0.5, vocabulary=vocabulary)
    )


_A100_STEP = SimulatedEngine(
    OPT_13B_ON_A100, Capacity(1, 16, max_tokens=2048, max_sequences=16, max_context=2049)
).step_seconds


def saturation(run: Run, made: Bench, traffic: Traffic, seed: int) -> float:
    """The steady saturation rate of a seed's jobs, in jobs per second: completions in the middle
    80% of a backlogged first-come-first-served run.

    The backlog repeats the very jobs that the seed's trials serve: outputs have heavy tails, so a
    thousand jobs are several percent more or less work than a thousand others, and at load 0.9
    an error of 2% in the rate is one of 20% in what is left of it. Measured once per seed.
    """

    def measure() -> float:
        run.progress.expect(1)
        jobs = _repeated(traffic.jobs(offline, made.count, seed), made.backlog)
        outcome = made.engine.serve(jobs, Setup(lambda cost: make_policy("fcfs", cost=cost)))
        run.progress.done(f"{traffic.name}, seed {seed}: saturation")
        return outcome.completion_rate()

    return run.once(("saturation", traffic.name, made.count, seed), measure)


def _repeated(jobs: Sequence[Job], count: int) -> list[Job]:
    """The jobs over and over, whole rounds of them, until there are at least `count`."""
    rounds = -(-count // len(jobs))
    return [
        replace(job, id=f"{turn}-{job.id}") if turn else job
        for turn in range(rounds)
        for job in jobs
    ]


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The items from number `by` on, and then those before: a different order for each seed."""
    cut = by % len(items)
    return [*items[cut:], *items[:cut]]
