"""What service a request is expected to take, and the place in the queue that follows from it.

Outputs whose length nobody predicted are taken to be as long as the mean. A gateway keeps one of
these (gateway/pace.py), and so does the simulator.
"""

from __future__ import annotations

import math

from baton.types import LengthEstimate
from scheduling.aging import aging_factor, handicap

FIRST_MEAN_TOKENS = 128.0
MEAN_WEIGHT = 0.02  # of the last output in the mean
SERVICE_WEIGHT = 0.05  # of the last request in the mean of the expected service


class ExpectedService:
    """Told of ages and of outputs that end; asked at each submission. All in seconds."""

    def __init__(
        self,
        prefill_base: float,
        prefill_per_token: float,
        token_seconds: float,
        *,
        aging: float | None = None,
    ) -> None:
        """What work costs; the attributes may be set anew. `aging`: the knob of predicted-srpt,
        None under policies that wait by arrival."""
        self.prefill_base = prefill_base
        self.prefill_per_token = prefill_per_token
        self.token_seconds = token_seconds
        self.mean_tokens = FIRST_MEAN_TOKENS  # of one output
        self._aging = aging
        self._service = 0.0  # mean expected service of the requests that came
        self._age: float | None = None  # mean age of the live ones, smoothed over a service time
        self._looked_at = 0.0

    def ended(self, generated: int) -> None:
        """One output is complete, with so many tokens."""
        self.mean_tokens += MEAN_WEIGHT * (generated - self.mean_tokens)

    def mean_age(self, age: float | None, now: float) -> None:
        """How long live requests have been here, by which aging follows the load; None: there are
        none."""
        if age is not None and self._age is not None:
            step = -math.expm1((self._looked_at - now) / max(self._service, 1e-6))
            age = self._age + (age - self._age) * step
        self._age, self._looked_at = age, now

    def tokens(self, estimate: LengthEstimate | None, most: int) -> float:
        """Expected output of one sequence that may have `most` tokens."""
        return min(self.mean_tokens if estimate is None else estimate.tokens, most)

    def service(self, prompt_tokens: int, output_tokens: float) -> float:
        """Expected seconds for a prompt and the output to it."""
        prefill = self.prefill_base + self.prefill_per_token * prompt_tokens
        return prefill + self.token_seconds * output_tokens

    def comes(self, service: float) -> float:
        """A request comes that is expected to take so long. Returns its handicap: by how many
        seconds a younger one may stand before it."""
        self._service += SERVICE_WEIGHT * (service - self._service) if self._service else service
        if self._aging is None:
            return 0.0
        return handicap(service, aging_factor(self._aging, self._service, self._age or 0.0))
