"""How long a sequence will still take, from its predicted length and the fitted cost of passes."""

from __future__ import annotations

from collections.abc import Collection

from scheduling.cost import CostTracker, Work
from scheduling.sequence import Sequence

UNPREDICTED = 128
"""Output tokens that are expected where nothing at all is predicted."""

_RECENT = 1 / 64  # weight of the newest in running means
_DRIFT = 0.1  # relative change of the time per token that is worth a new order


class _RunningMean:
    """Of all at first, then of the latest."""

    def __init__(self) -> None:
        self.mean = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        self._count += 1
        self.mean += (value - self.mean) * max(1 / self._count, _RECENT)


class RemainingWork:
    """Predicted work, in seconds of passes with this sequence in them.

    A request without an estimate is expected to be as long as those with one are on average. A
    sequence that outlives its estimate is expected to go on for a quarter of what it has
    generated: the longer it has run, the longer it will.
    """

    def __init__(self, cost: CostTracker) -> None:
        self._cost = cost
        self._lengths, self._services = _RunningMean(), _RunningMean()
        self._passes = self._charges = 0  # since the last `measure`
        self._width = 1.0  # running mean of the sequences in a pass
        self._pass_ended: float | None = None
        self.token_seconds = cost.model.seconds(Work(sequences=1))
        """Of a generated token, in a pass as wide as they are."""

    def join(self, sequence: Sequence) -> None:
        """It has arrived: predict its length."""
        estimate, most = sequence.request.estimate, sequence.request.stopping.max_tokens
        if estimate is not None:
            self._lengths.add(estimate.tokens)
        expected = estimate.tokens if estimate is not None else self._lengths.mean or UNPREDICTED
        sequence.expected = max(1.0, min(expected, most))
        self._services.add(self.seconds(sequence))

    @property
    def mean_seconds(self) -> float:
        """Of a whole request: running mean over those that came."""
        return self._services.mean

    def seconds(self, sequence: Sequence) -> float:
        """Seconds of passes until it ends, as predicted; never for more tokens than may come."""
        total = len(sequence.tokens)
        generated = total - sequence.prompt_length
        left = sequence.expected - generated
        quarter = 0.25 * generated
        if left < quarter:
            left = quarter
        most = sequence.request.stopping.max_tokens - generated
        seconds = (left if left < most else most) * self.token_seconds
        computed, cached = sequence.computed, sequence.cached
        uncomputed = total - (computed if computed > cached else cached)
        return seconds if uncomputed == 1 else seconds + self.catching_up(uncomputed)

    def catching_up(self, uncomputed: int) -> float:
        """Seconds of passes until so many tokens of one sequence are computed."""
        return self._cost.model.first_iteration(uncomputed)

    def ran(self, now: float, passes: int = 1) -> None:
        """One more sequence was in the pass that ended `now`, or in so many in a row."""
        if now != self._pass_ended:
            self._pass_ended = now
            self._passes += passes
        self._charges += passes

    def measure(self, sequences: Collection[Sequence]) -> bool:
        """Work out the time per generated token again, from the passes since the last call.
        Returns whether it has changed so much that orders by it should, too."""
        if not self._passes or not sequences:
            return False
        self._width += 0.5 * (self._charges / self._passes - self._width)
        self._passes = self._charges = 0
        context = sum(s.computed for s in sequences) / len(sequences)
        work = Work(sequences=round(self._width), context=round(self._width * context))
        seconds = self._cost.model.seconds(work)
        if abs(seconds - self.token_seconds) <= _DRIFT * self.token_seconds:
            return False
        self.token_seconds = seconds
        return True
