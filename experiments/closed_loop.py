"""DeepSpeed-FastGen's benchmark: clients that each send a request when their last one has ended,
long prompts, short outputs; and the two ways of batching that it compares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from experiments.engines import Engine, Setup, SimulatedEngine
from experiments.experiment import Run
from scheduling.cost import LinearCost
from scheduling.order import make_policy
from scheduling.plan import Capacity
from scheduling.rules import Rules
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.profiles import profile
from scheduling.simulator.traffic import ClosedLoop, Job

CLIENTS = 16
WHOLE = 4096
"""Token budget of passes of whole prompts: several short ones, or one of any length."""

PREFILL_FIRST = "prefill-first"
SPLITFUSE = "splitfuse"

_SPREAD = 0.3  # standard deviation of lengths over their mean, as in FastGen's benchmark
_REAL_SCALE = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """Mean tokens in and out, at full scale."""

    prompt: int
    output: int

    @property
    def name(self) -> str:
        """As the paper writes it."""
        return f"{self.prompt}/{self.output}"


@dataclass(frozen=True, slots=True)
class Stage:
    """An engine for these experiments. Prompts and budgets are shorter by `scale`; outputs are
    not, so that as many gaps as in the paper fall between two prompts."""

    engine: Engine
    cost: LinearCost
    scale: int
    requests: int

    @property
    def step(self) -> float:
        """Seconds of a generation pass of a full batch."""
        return self.engine.step_seconds

    @property
    def prompt_speed(self) -> float:
        """Prompt tokens that the engine computes in a second."""
        return 1 / self.cost.per_token

    def jobs(self, shape: Shape, seed: int) -> Iterator[Job]:
        """Requests with normally distributed lengths around the means."""
        rng = np.random.default_rng(seed)
        most = self.engine.capacity.max_context
        for number in range(self.requests):
            drawn = rng.normal(shape.prompt, _SPREAD * shape.prompt) / self.scale
            length = max(2, round(rng.normal(shape.output, _SPREAD * shape.output)))
            prompt = min(max(1, round(drawn)), most - length - 1)
            yield Job(f"r{number:05d}", 0.0, prompt, length, length)

    def serve(
        self, shape: Shape, seed: int, *, batching: str, budget: int, clients: int = CLIENTS
    ) -> Outcome:
        """One run, with token times. `budget` at full scale."""
        rules = Rules(batching="splitfuse" if batching == SPLITFUSE else "prefill-first")
        setup = Setup(
            lambda cost: make_policy("fcfs", cost=cost),
            rules,
            replace(self.engine.capacity, max_tokens=budget // self.scale),
            keep_token_times=True,
        )
        return self.engine.serve(ClosedLoop(self.jobs(shape, seed), clients), setup)


def stage(run: Run) -> Stage:
    """The stage of a run, made once: Mistral-7B on an H200 by the roofline, or a small Llama."""
    return run.once("closed loop", lambda: _real(run) if run.engine == "real" else _simulated(run))


def _simulated(run: Run) -> Stage:
    made = profile("h200-mistral-7b")
    capacity = made.capacity(max_tokens=WHOLE, max_sequences=CLIENTS)
    return Stage(
        SimulatedEngine(made.cost, capacity, context=2600), made.cost, 1, run.sized(400, 96)
    )


def _real(run: Run) -> Stage:
    from experiments.real import tiny_llama  # imports torch

    capacity = Capacity(
        blocks=2048,
        block_size=16,
        max_tokens=WHOLE // _REAL_SCALE,
        max_sequences=CLIENTS,
        max_context=WHOLE // _REAL_SCALE * 2,
    )
    engine = tiny_llama(layers=1, hidden=448, capacity=capacity)
    return Stage(engine, engine.cost, _REAL_SCALE, run.sized(128, 32))
