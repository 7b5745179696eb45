"""What work costs on this cluster, in seconds, and the place in the queue that follows from it.

The workers measure what a pass costs and report it; until they have, the configuration's guesses
stand. Outputs of requests whose length nobody predicted are taken to be as long as the mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from baton.config import GatewayConfig
from baton.types import Request
from gateway.job import Job
from queueing.contract import Role, Submission, WorkerRecord
from scheduling.aging import handicap, loaded_aging

FIRST_MEAN_TOKENS = 128.0
MEAN_WEIGHT = 0.02  # of the last output in the mean
DEFAULT_SLOTS = 64  # sequences in a batch, of workers that do not say


class Pace:
    """Told by the registry, the queue's depth and requests that end; asked at each submission."""

    def __init__(self, config: GatewayConfig) -> None:
        """Begin with the configuration's guesses."""
        self.prefill_base = config.prefill_seconds_base
        self.prefill_per_token = config.prefill_seconds_per_token
        self.token_seconds = config.token_seconds
        self.mean_tokens = FIRST_MEAN_TOKENS  # of one output
        self.waiting = 0  # requests in the pool's queue, at the last look
        self._slots = DEFAULT_SLOTS
        self._predicts = config.policy == "predicted-srpt"
        self._aging = config.srpt_aging

    def workers(self, records: Iterable[WorkerRecord]) -> bool:
        """What live workers measured. True if the cost of a first iteration is known now."""
        records = list(records)
        decode = [r for r in records if r.role is Role.DECODE]
        self._slots = sum(r.batch_sequences or DEFAULT_SLOTS for r in decode) or DEFAULT_SLOTS
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
        aging = loaded_aging(self._aging, self.waiting, self._slots)
        predicted = self._predicts and request.estimate is not None
        return Submission(
            request_id=request.id,
            tenant=job.tenant,
            prompt_tokens=len(request.prompt_ids),
            max_tokens=request.stopping.max_tokens,
            priority=request.priority,
            time_to_live=time_to_live,
            handicap=handicap(cost, aging) if self._predicts else 0.0,
            cost=cost,
            predicted_tokens=round(self.output_tokens(request)) if predicted else None,
        )
