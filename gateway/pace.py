"""What work costs on this cluster, in seconds, and the place in the queue that follows from it.

The workers measure what a pass costs and report it; until they have, the configuration's guesses
stand. Outputs of requests whose length nobody predicted are taken to be as long as the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from baton.config import GatewayConfig
from baton.types import Request
from gateway.job import Job
from queueing.contract import Role, Submission, WorkerRecord
from scheduling.aging import aging_factor, handicap

FIRST_MEAN_TOKENS = 128.0
MEAN_WEIGHT = 0.02  # of the last output in the mean
SERVICE_WEIGHT = 0.05  # of the last request in the mean of the expected service


class Pace:
    """Told by the registry, of ages and of requests that end; asked at each submission."""

    def __init__(self, config: GatewayConfig) -> None:
        """Begin with the configuration's guesses."""
        self.prefill_base = config.prefill_seconds_base
        self.prefill_per_token = config.prefill_seconds_per_token
        self.token_seconds = config.token_seconds
        self.mean_tokens = FIRST_MEAN_TOKENS  # of one output
        self._predicts = config.policy == "predicted-srpt"
        self._knob = config.srpt_aging
        self._service = 0.0  # mean expected service of the requests that came
        self._age: float | None = None  # mean age of the live ones, smoothed over a service time
        self._looked_at = 0.0

    def workers(self, records: Iterable[WorkerRecord]) -> bool:
        """What live workers measured. True if the cost of a first iteration is known now."""
        records = list(records)
        decode = [r for r in records if r.role is Role.DECODE]
        tokens = [r.load.token_seconds for r in decode if r.load and r.load.token_seconds > 0]
        if tokens:
            self.token_seconds = median(tokens)
        prefill = [r for r in records if r.role is Role.PREFILL] or decode
        loads = [r.load for r in prefill if r.load and r.load.prefill_base > 0]
        if not loads:
            return False
        self.prefill_base = median(load.prefill_base for load in loads)
        self.prefill_per_token = median(load.prefill_per_token for load in loads)
        return True

    def ended(self, generated: int) -> None:
        """One output is complete, with so many tokens."""
        self.mean_tokens += MEAN_WEIGHT * (generated - self.mean_tokens)

    def ages(self, ages: Sequence[float], now: float) -> None:
        """How long this gateway's live requests have been here, by which aging follows the load."""
        if not ages:
            self._age = None
            return
        age = sum(ages) / len(ages)
        if self._age is not None:
            step = -math.expm1((self._looked_at - now) / max(self._service, 1e-6))
            age = self._age + (age - self._age) * step
        self._age, self._looked_at = age, now

    def output_tokens(self, request: Request) -> float:
        """Expected output of all sequences together."""
        each = self.mean_tokens if request.estimate is None else request.estimate.tokens
        return request.sampling.n * min(each, request.stopping.max_tokens)

    def kv_tokens(self, request: Request) -> int:
        """Tokens whose KV is expected to be held at the end: for the upper end of a prediction."""
        n, most = request.sampling.n, request.stopping.max_tokens
        each = self.mean_tokens if request.estimate is None else request.estimate.allotment
        return len(request.prompt_ids) + n * min(round(each), most)

    def cost(self, request: Request) -> float:
        """Expected seconds of service."""
        prefill = self.prefill_base + self.prefill_per_token * len(request.prompt_ids)
        return prefill + self.token_seconds * self.output_tokens(request)

    def submission(self, job: Job, time_to_live: float | None) -> Submission:
        """What the queue is told of a request."""
        request = job.request
        cost = self.cost(request)
        self._service += SERVICE_WEIGHT * (cost - self._service) if self._service else cost
        return Submission(
            request_id=request.id,
            tenant=job.tenant,
            prompt_tokens=len(request.prompt_ids),
            max_tokens=request.stopping.max_tokens,
            priority=request.priority,
            time_to_live=time_to_live,
            handicap=self._handicap(cost) if self._predicts else 0.0,
            cost=cost,
            predicted_tokens=round(self.output_tokens(request)) if self._predicts else None,
        )

    def _handicap(self, cost: float) -> float:
        return handicap(cost, aging_factor(self._knob, self._service, self._age or 0.0))
