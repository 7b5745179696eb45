"""The orders that experiments compare, by the label that plots and tables show."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from experiments.benches import Bench
from experiments.engines import MakePolicy
from scheduling.mlfq import Mlfq
from scheduling.order import make_policy
from scheduling.simulator.traffic import Estimator, unpredicted

FCFS = "fcfs"
SKIP_JOIN = "skip-join-mlfq"
PROMOTED = "skip-join-mlfq, promotion"


@dataclass(frozen=True, slots=True)
class Order:
    """`policy` builds it for a bench; `estimator` is what its requests carry."""

    label: str
    policy: Callable[[Bench], MakePolicy]
    estimator: Estimator = unpredicted


def levels(bench: Bench, promote_after: float = math.inf) -> Mlfq:
    """FastServe's queues: the first quantum is the shortest pass, each is twice the one before.
    `promote_after` in seconds of OPT-13B on an A100."""
    return Mlfq(
        levels=16,
        quantum=bench.engine.step_seconds,
        ratio=2.0,
        promote_after=promote_after * bench.second,
    )


def named(policy: str, *, promote_after: float = math.inf) -> Callable[[Bench], MakePolicy]:
    """A policy by its name, with FastServe's levels."""

    def of(bench: Bench) -> MakePolicy:
        mlfq = levels(bench, promote_after)
        return lambda cost: make_policy(policy, mlfq=mlfq, cost=cost)

    return of


ORDERS = (
    Order(FCFS, named("fcfs")),
    Order(SKIP_JOIN, named("skip-join-mlfq")),
    Order(PROMOTED, named("skip-join-mlfq", promote_after=3.0)),
)
