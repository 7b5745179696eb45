"""The orders that experiments compare, by the label that plots and tables show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from baton.config import SchedulingConfig
from experiments.benches import Bench
from experiments.engines import MakePolicy
from experiments.experiment import Run
from experiments.learning import Learning, warm
from experiments.traffic import Traffic
from scheduling.mlfq import Mlfq
from scheduling.order import make_policy
from scheduling.simulator.traffic import Estimator, Job, OpenLoop, Source, noisy, oracle

FCFS = "fcfs"
MLFQ = "mlfq"
SKIP_JOIN = "skip-join-mlfq"
PROMOTED = "skip-join-mlfq, promotion"
LEARNED = "predicted-srpt"
ORACLE = "srpt-oracle"

Feed = Callable[[Run, Traffic, Sequence[Job], int], Source]
"""(run, what the jobs were drawn from, jobs, seed) to the jobs with what is predicted of them."""


def plain(run: Run, traffic: Traffic, jobs: Sequence[Job], seed: int) -> Source:
    """Nothing is predicted."""
    return OpenLoop(jobs)


def learned(run: Run, traffic: Traffic, jobs: Sequence[Job], seed: int) -> Source:
    """By a predictor that learns as it goes."""
    return Learning(jobs, warm(run, traffic).copy())


def estimated(estimator: Estimator) -> Feed:
    """Each job has its estimate before it comes."""

    def feed(run: Run, traffic: Traffic, jobs: Sequence[Job], seed: int) -> Source:
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


def named(
    policy: str, *, promote_after: float = math.inf, aging: float = 1.0
) -> Callable[[Bench], MakePolicy]:
    """A policy by its name, with FastServe's levels."""

    def of(bench: Bench) -> MakePolicy:
        mlfq = levels(bench, promote_after)
        return lambda cost: make_policy(policy, mlfq=mlfq, cost=cost, aging=aging)

    return of


_PROMOTE_AFTER = 3.0  # seconds, as in FastServe's artifact
_SHIPPED_PROMOTE_AFTER: float = SchedulingConfig.model_fields["mlfq_promote_after"].default

UNPREDICTED = (
    Order(FCFS, named("fcfs")),
    Order(MLFQ, named("mlfq")),
    Order(SKIP_JOIN, named("skip-join-mlfq")),
    Order(PROMOTED, named("skip-join-mlfq", promote_after=_PROMOTE_AFTER)),
)
"""Orders that need to know nothing of lengths."""

BOUND = Order(ORACLE, named("srpt-oracle"), estimated(oracle))


def predicted(aging: float = 1.0, feed: Feed = learned, label: str = LEARNED) -> Order:
    """Predicted SRPT with a value of its knob, and promotion as Baton ships it."""
    order = named("predicted-srpt", promote_after=_SHIPPED_PROMOTE_AFTER, aging=aging)
    return Order(label, order, feed)


ORDERS = (*UNPREDICTED, predicted(), BOUND)
NOISY = (
    predicted(feed=estimated(noisy(0.5)), label=f"{LEARNED}, sigma 0.5"),
    predicted(feed=estimated(noisy(1.0)), label=f"{LEARNED}, sigma 1"),
)
"""Predictions made of the truth and noise."""
