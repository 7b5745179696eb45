"""The orders that experiments compare, by the label that plots and tables show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.benches import Bench
from experiments.engines import MakePolicy
from scheduling.mlfq import Mlfq
from scheduling.order import make_policy
from scheduling.simulator.traffic import Estimator, Job, OpenLoop, Source

FCFS = "fcfs"
MLFQ = "mlfq"
SKIP_JOIN = "skip-join-mlfq"
PROMOTED = "skip-join-mlfq, promotion"
LEARNED = "predicted-srpt"
ORACLE = "srpt-oracle"

Feed = Callable[[Sequence[Job], int], Source]
"""(jobs, seed) to the same jobs with what is predicted of them."""


def plain(jobs: Sequence[Job], seed: int) -> Source:
    """Nothing is predicted."""
    return OpenLoop(jobs)


def estimated(estimator: Estimator) -> Feed:
    """Each job gets its estimate when it is made."""

    def feed(jobs: Sequence[Job], seed: int) -> Source:
        rng = np.random.default_rng((seed, 99))
        return OpenLoop(
            replace(job, estimate=estimator(rng, job.output_tokens, job.max_tokens)) for job in jobs
        )

    return feed


@dataclass(frozen=True, slots=True)
class Order:
    """`policy` builds it for a bench; `feed` adds the predictions that it goes by."""

    label: str
    policy: Callable[[Bench], MakePolicy]
    feed: Feed = plain


def levels(bench: Bench, promote_after: float = math.inf) -> Mlfq:
    """FastServe's queues: the first quantum is a full batch's pass, each is twice the one before.
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
