"""The two engines that experiments run on: one decode worker that computes prompts itself, with a
cost model or with a real model under the same scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from experiments.records import EngineName
from scheduling.cost import CostTracker, LinearCost
from scheduling.order import Policy
from scheduling.plan import Capacity
from scheduling.rules import Rules
from scheduling.simulator.engine import simulate
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.traffic import Job, Source
from scheduling.simulator.worker import WorkerSpec

MakePolicy = Callable[[CostTracker], Policy]
"""Builds a fresh order for one run."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What may be swapped between two runs of one engine. `capacity` None: the engine's own; an
    engine's KV pool cannot grow beyond that."""

    policy: MakePolicy
    rules: Rules = field(default_factory=Rules)
    capacity: Capacity | None = None
    keep_token_times: bool = False


class Engine(Protocol):
    """Serves jobs to the end."""

    @property
    def name(self) -> EngineName:
        """Which of the two."""
        ...

    @property
    def capacity(self) -> Capacity:
        """What it has."""
        ...

    @property
    def step_seconds(self) -> float:
        """A generation pass of a full batch at a usual context: the unit for quanta."""
        ...

    def serve(self, jobs: Iterable[Job] | Source, setup: Setup) -> Outcome:
        """One run from the first arrival to the last token."""
        ...


class SimulatedEngine:
    """A cost model instead of a device. Deterministic."""

    name: EngineName = "simulator"

    def __init__(
        self,
        cost: LinearCost,
        capacity: Capacity,
        *,
        context: int = 300,
        swap_seconds_per_block: float = 0.0,
    ) -> None:
        """`context`: the usual tokens of a sequence, for `step_seconds`."""
        self._cost = cost
        self._capacity = capacity
        self._context = context
        self._swap_seconds_per_block = swap_seconds_per_block

    @property
    def capacity(self) -> Capacity:
        """What it pretends to have."""
        return self._capacity

    @property
    def step_seconds(self) -> float:
        """By the cost model."""
        batch = self._capacity.max_sequences
        return (
            self._cost.base
            + self._cost.per_sequence * batch
            + self._cost.per_context * batch * self._context
        )

    def serve(self, jobs: Iterable[Job] | Source, setup: Setup) -> Outcome:
        """One run, in no time."""
        spec = WorkerSpec(
            capacity=setup.capacity or self._capacity,
            cost=self._cost,
            policy=setup.policy,
            rules=setup.rules,
            swap_seconds_per_block=self._swap_seconds_per_block,
        )
        return simulate(jobs, spec, keep_token_times=setup.keep_token_times)
