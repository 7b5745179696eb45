"""How large a cluster must be: the question, one simulated try, the answer. The search for it is
in search.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from scheduling.cost import CostTracker
from scheduling.mlfq import Mlfq
from scheduling.order import Policy
from scheduling.rules import Rules
from scheduling.simulator.cluster import ClusterSpec, simulate_cluster
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.profiles import Profile
from scheduling.simulator.queue import QueueOrder
from scheduling.simulator.traffic import Job
from scheduling.simulator.worker import WorkerSpec

UNSTABLE = math.inf


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds for the given percentile of all requests. None: no limit."""

    ttft: float | None
    tpot: float | None
    percentile: float = 95.0

    def __post_init__(self) -> None:
        if self.ttft is None and self.tpot is None:
            raise ValueError("an SLO limits the time to first token, per output token, or both")

    def usage(self, outcome: Outcome) -> dict[str, float]:
        """How much of each limit is used up: above 1 it is broken."""
        found = {}
        if self.ttft is not None:
            found["TTFT"] = _percentile(outcome.first_token(), self.percentile) / self.ttft
        if self.tpot is not None:
            found["TPOT"] = _percentile(outcome.per_output_token(), self.percentile) / self.tpot
        return found


def _percentile(values: np.ndarray, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else 0.0


@dataclass(frozen=True, slots=True)
class Tuning:
    """The knobs that are searched for: tokens and sequences of a pass, and the levels."""

    max_tokens: int
    max_sequences: int
    mlfq: Mlfq


@dataclass(frozen=True, slots=True)
class Layout:
    """Numbers of workers."""

    prefill: int
    decode: int

    def __str__(self) -> str:
        return f"{self.prefill} prefill + {self.decode} decode"


@dataclass(frozen=True, slots=True)
class Trial:
    """One simulated cluster. `usage` is that of `Slo.usage`; `stable` is False if the queue was
    longer at the end of the arrivals than half way."""

    layout: Layout
    tuning: Tuning
    outcome: Outcome
    usage: dict[str, float]
    stable: bool

    @property
    def score(self) -> float:
        """The worst usage; lower is better."""
        return max(self.usage.values()) if self.stable else UNSTABLE

    @property
    def meets(self) -> bool:
        """All limits hold."""
        return self.score <= 1.0 and not self.outcome.rejected

    @property
    def limit(self) -> str:
        """What binds: the limit that is used up most, or the throughput."""
        if not self.stable:
            return "throughput"
        return max(self.usage, key=lambda name: self.usage[name])


@dataclass(frozen=True, slots=True)
class Question:
    """What to search for. `jobs(count, seed)` gives traffic at the wanted rate; `policy` builds
    the order from levels. `price` is what a prefill worker costs in decode workers."""

    jobs: Callable[[int, int], list[Job]]
    slo: Slo
    prefill: Profile
    decode: Profile
    policy_name: str
    policy: Callable[[Mlfq, CostTracker], Policy]
    rules: Rules = field(default_factory=Rules)
    max_workers: int = 64
    price: float = 1.0
    requests: int = 2000
    token_budgets: tuple[int, ...] = (256, 512, 1024, 2048)
    sequence_limits: tuple[int, ...] = (16, 32, 64, 128, 256)
    quanta: tuple[float, ...] = (1.0, 4.0, 16.0)  # in generation passes
    split: bool = True  # also with prefill workers
    seed: int = 0


@dataclass(slots=True)
class Answer:
    """What the search found: `best` is None if nothing up to the most workers meets the SLOs,
    and `reason` says what stands in the way. `trials` holds everything tried at full length."""

    best: Trial | None
    reason: str
    trials: list[Trial] = field(default_factory=list)


def simulate_trial(
    question: Question, layout: Layout, tuning: Tuning, jobs: Sequence[Job]
) -> Trial:
    """Simulate one cluster."""

    def policy(cost: CostTracker) -> Policy:
        return question.policy(tuning.mlfq, cost)

    def worker(profile: Profile) -> WorkerSpec:
        capacity = profile.capacity(
            max_tokens=tuning.max_tokens, max_sequences=tuning.max_sequences
        )
        return WorkerSpec(capacity, profile.cost, policy, question.rules)

    spec = ClusterSpec(
        decode=worker(question.decode),
        decode_workers=layout.decode,
        prefill=worker(question.prefill) if layout.prefill else None,
        prefill_workers=layout.prefill,
        transfer=question.prefill.transfer,
        queue=QueueOrder(question.policy_name, tuning.mlfq),
    )
    outcome = simulate_cluster(jobs, spec)
    measured = outcome.after_warmup()
    return Trial(layout, tuning, measured, question.slo.usage(measured), is_stable(outcome))


def is_stable(outcome: Outcome) -> bool:
    """Compares how many jobs were in the cluster half way through the arrivals and at their
    end."""
    arrivals = np.sort([s.job.arrived_at for s in outcome.served])
    ends = np.sort([s.finished_at for s in outcome.served])
    if len(arrivals) < 20:
        return True

    def present(time: float) -> int:
        return int(np.searchsorted(arrivals, time, "right") - np.searchsorted(ends, time, "right"))

    half, end = present(arrivals[len(arrivals) // 2]), present(arrivals[-1])
    return end <= 1.5 * half + 0.01 * len(arrivals) + 10
