"""What work costs on this cluster, in seconds, and the place in the queue that follows from it.

The workers measure what a pass costs and report it; until they have, the configuration's guesses
stand. The arithmetic is scheduling/expected.py, which the simulator uses, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from baton.config import GatewayConfig
from baton.types import Request
from gateway.job import Job
from queueing.contract import Role, Submission, WorkerRecord
from scheduling.expected import ExpectedService


class Pace(ExpectedService):
    """Told by the registry, of ages and of requests that end; asked at each submission."""

    def __init__(self, config: GatewayConfig) -> None:
        """Begin with the configuration's guesses."""
        self._predicts = config.policy == "predicted-srpt"
        super().__init__(
            config.prefill_seconds_base,
            config.prefill_seconds_per_token,
            config.token_seconds,
            aging=config.srpt_aging if self._predicts else None,
        )

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

    def ages(self, ages: Sequence[float], now: float) -> None:
        """How long this gateway's live requests have been here, by which aging follows the load."""
        self.mean_age(sum(ages) / len(ages) if ages else None, now)

    def output_tokens(self, request: Request) -> float:
        """Expected output of all sequences together."""
        return request.sampling.n * self.tokens(request.estimate, request.stopping.max_tokens)

    def kv_tokens(self, request: Request) -> int:
        """Tokens whose KV is expected to be held at the end: for the upper end of a prediction."""
        n, most = request.sampling.n, request.stopping.max_tokens
        each = self.mean_tokens if request.estimate is None else request.estimate.allotment
        return len(request.prompt_ids) + n * min(round(each), most)

    def cost(self, request: Request, cached: int = 0) -> float:
        """Expected seconds of service, where so many tokens of the prompt are cached."""
        return self.service(len(request.prompt_ids) - cached, self.output_tokens(request))

    def submission(self, job: Job, time_to_live: float | None, cached: int = 0) -> Submission:
        """What the queue is told of a request."""
        request = job.request
        tokens, cost = round(self.output_tokens(request)), self.cost(request, cached)
        return Submission(
            request_id=request.id,
            tenant=job.tenant,
            prompt_tokens=len(request.prompt_ids),
            max_tokens=request.sampling.n * request.stopping.max_tokens,
            cached_tokens=cached,
            priority=request.priority,
            time_to_live=time_to_live,
            handicap=self.comes(cost),
            cost=cost,
            predicted_tokens=tokens if self._predicts else None,
            token_cost=self.token_seconds,
            expected_tokens=tokens,
        )
