"""What the queue is told by whoever configures it."""

from __future__ import annotations

from dataclasses import dataclass

from queueing.keys import BAND_WIDTH


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """Policy of a pool. Gateways write it to the server; the last one wins. Times in seconds.

    A request joins the first of `levels` whose quantum (`quantum` * `ratio` ** level) covers its
    first iteration: `prefill_seconds_base` plus `prefill_seconds_per_token` for each prompt token
    that is not cached (skip-join, FastServe section 4.1).
    """

    levels: int = 5
    quantum: float = 0.05
    ratio: float = 4.0
    promote_after: float = 5.0
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
        if not 1 <= self.levels <= BAND_WIDTH:
            raise ValueError(f"levels must be 1 to {BAND_WIDTH}")

    def quantum_of(self, level: int) -> float:
        """Seconds of service that a request gets in `level` before it is demoted."""
        return float(self.quantum * self.ratio**level)
