"""Shortest remaining processing time first: as predicted, and as an oracle knows it.

Predicted work minus `aging` times age is the order. Age grows alike for all, so the order is that
of `work + aging * arrived_at`, which stands still between passes.

How much age should count depends on the load. Where nobody waits it hardly matters; near
saturation ages are many times the work of a request, and a fixed factor turns the order into first
come, first served. So the factor follows what is measured: it is `(service / age) ** 2`, of the
mean predicted work of a request and the mean age of those that are here, times the one knob.
docs/decisions/004-predicted-srpt.md compares it with others.

MLFQ is the guard against mispredictions: a sequence that outlives its estimate sinks a level, and
again each time it has outlived the double, and is expected to go on for a quarter of what it has
generated (scheduling/remaining.py). Whoever starves comes first for a quantum
(scheduling/standing.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from collections.abc import Sequence as Items

from scheduling.aging import AGING, MOST_AGING, aging_factor
from scheduling.cost import CostTracker
from scheduling.mlfq import Mlfq
from scheduling.remaining import RemainingWork
from scheduling.sequence import Sequence
from scheduling.standing import PreemptivePolicy

_ROUNDING = 1e-6  # of a token
_PATIENCE = 3.0  # mean ages without service before somebody counts as starved
_DRIFT = 0.1  # relative change of the factor that is worth a new order


class PredictedSrpt(PreemptivePolicy):
    """By predicted remaining work, aged; `aging` 0 is best for the mean, more for the tail."""

    def __init__(self, mlfq: Mlfq, cost: CostTracker, *, aging: float = 1.0) -> None:
        super().__init__(
            RemainingWork(cost),
            promote_after=mlfq.promote_after,
            quantum=mlfq.quantum,
            patience_in_ages=_PATIENCE,
        )
        self._mlfq = mlfq
        self._cost = cost
        self._knob = aging
        self.aging = min(AGING * aging, MOST_AGING)
        """How many seconds of predicted work a second of age makes up for, at this load."""

    def join(self, sequence: Sequence, tokens: int, now: float) -> None:
        """Keep the level that the sequence had sunk to elsewhere."""
        sequence.level = min(sequence.level, self._mlfq.levels - 1)
        super().join(sequence, tokens, now)

    def next_run(self, ranked: Items[Sequence], slots: int, now: float) -> list[float]:
        """The work of all before it, `slots` at a time, or when it counts as starved."""
        ahead, times = 0.0, []
        for place, sequence in enumerate(ranked):
            waits = min(ahead / slots, self.lifted_in(sequence, now))
            times.append(0.0 if place < slots else waits)
            ahead += self._work.seconds(sequence)
        return times

    # -- Measures --------------------------------------------------------------------------

    def _measure(self, sequence: Sequence) -> float:
        return self._work.seconds(sequence) + self.aging * sequence.arrived_at

    def _served(self, sequence: Sequence, seconds: float) -> None:
        """Its rank is worked out at the next plan: its new token is not there yet."""
        sequence.rank = None
        generated, last = len(sequence.tokens) - sequence.prompt_length, self._mlfq.levels - 1
        while sequence.level < last and generated >= sequence.expected * 2**sequence.level:
            sequence.level += 1

    def _until_behind(self, sequence: Sequence, other: Sequence, pass_seconds: float) -> float:
        """Service improves a place until the sequence outlives its estimate; from then on a
        quarter of what it has generated counts."""
        room = self.rank(other)[2] - self.aging * sequence.arrived_at
        tokens = 4 * room / self._work.token_seconds - sequence.generated
        return max(0.0, tokens - _ROUNDING) * pass_seconds

    def _look_again_at(self) -> float:
        return self._retune_at

    # -- The load --------------------------------------------------------------------------

    def _retune(self, sequences: Collection[Sequence], now: float) -> bool:
        changed = super()._retune(sequences, now)
        if not self._knob or self._age is None:
            return changed
        factor = aging_factor(self._knob, self._work.mean_seconds, self._age)
        if abs(factor - self.aging) <= _DRIFT * self.aging:
            return changed
        self.aging = factor
        return True


class SrptOracle(PreemptivePolicy):
    """By remaining work, taking estimates for the truth: a bound for experiments. Nobody is aged
    or guarded, and a request without an estimate is expected to be as long as it may be."""

    def __init__(self, cost: CostTracker) -> None:
        super().__init__(RemainingWork(cost), promote_after=math.inf, quantum=0.0)

    def join(self, sequence: Sequence, tokens: int, now: float) -> None:
        """Take its length from the estimate."""
        super().join(sequence, tokens, now)
        request = sequence.request
        most, estimate = request.stopping.max_tokens, request.estimate
        sequence.expected = most if estimate is None else min(estimate.tokens, most)

    def next_run(self, ranked: Items[Sequence], slots: int, now: float) -> list[float]:
        """The work of all before it, `slots` at a time."""
        ahead, times = 0.0, []
        for place, sequence in enumerate(ranked):
            times.append(0.0 if place < slots else ahead / slots)
            ahead += self._measure(sequence)
        return times

    def _measure(self, sequence: Sequence) -> float:
        seconds = max(0.0, sequence.expected - sequence.generated) * self._work.token_seconds
        uncomputed = sequence.uncomputed
        return seconds if uncomputed == 1 else seconds + self._work.catching_up(uncomputed)

    def _served(self, sequence: Sequence, seconds: float) -> None:
        sequence.rank = None

    def _until_behind(self, sequence: Sequence, other: Sequence, pass_seconds: float) -> float:
        """Service only improves a place."""
        return math.inf

    def _look_again_at(self) -> float:
        return self._retune_at
