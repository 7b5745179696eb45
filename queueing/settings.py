"""What the queue is told by whoever configures it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scheduling.mlfq import Mlfq

MAX_LEVELS = 32

_MLFQ = Mlfq()


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """Policy of a pool. Gateways write it to the server; the last one wins. Times in seconds.

    Under "skip-join-mlfq" a request joins the first of `levels` whose quantum (`quantum` * `ratio`
    ** level) covers its first iteration: `prefill_seconds_base` plus `prefill_seconds_per_token`
    for each prompt token that is not cached (FastServe section 4.1). Under every other policy it
    joins level 0; "fcfs" has no other.

    A tenant may have had `fairness_slack` seconds of service more than others before the order
    between them is no longer the policy's. A request is urgent from `urgent_before` seconds before
    the last moment at which its expected service would still end by its deadline.
    """

    policy: Literal["fcfs", "mlfq", "skip-join-mlfq", "predicted-srpt"] = "skip-join-mlfq"
    levels: int = _MLFQ.levels
    quantum: float = _MLFQ.quantum
    ratio: float = _MLFQ.ratio
    promote_after: float = _MLFQ.promote_after
    fairness_slack: float = 0.5
    urgent_before: float = 2.0
    prefill_seconds_per_token: float = 0.0005
    prefill_seconds_base: float = 0.005

    max_queued_requests: int = 10_000
    max_queued_tokens: int = 20_000_000
    max_requests_per_tenant: int = 1_000
    max_attempts: int = 4

    lease_ttl: float = 10.0  # a claimed request that no worker reports on is requeued
    gateway_ttl: float = 10.0  # requests of a gateway silent for this long are cancelled
    keep_ended: float = 30.0  # how long an ended request is remembered, for retries and reports

    def __post_init__(self) -> None:
        most = 1 if self.policy == "fcfs" else MAX_LEVELS
        if not 1 <= self.levels <= most:
            raise ValueError(f"levels must be 1 to {most}")

    def quantum_of(self, level: int) -> float:
        """Seconds of service that a request gets in `level` before it is demoted."""
        return float(self.quantum * self.ratio**level)
