"""When waiting sequences may join the batch (Rules.filling): at any pass, or only when it is empty.

For experiments (static and dynamic against continuous batching). Sequences whose KV comes from a
prefill worker join when it is there, whatever the rule.
"""

from __future__ import annotations

from collections.abc import Collection

from scheduling.rules import Rules
from scheduling.sequence import Phase, Sequence


class Door:
    """Lets a batch in, and then nobody until all of it have ended."""

    def __init__(self, rules: Rules, slots: int) -> None:
        self._rules = rules
        self._slots = slots
        self._batch: set[Sequence] = set()
        self.opens_at: float | None = None  # when it will, if it is closed for time alone

    def knock(self, ranked: list[Sequence], elsewhere: Collection[Sequence], now: float) -> None:
        """Before each plan. `ranked`: all that run or wait, best first; `elsewhere`: those that
        are being swapped."""
        self.opens_at = None
        if self._rules.filling == "continuous":
            return
        self._batch = {s for s in self._batch if s.phase is not Phase.FINISHED}
        waiting = [s for s in ranked if s.phase is Phase.WAITING]
        if self._batch or elsewhere or not waiting or len(waiting) < len(ranked):
            return
        if self._rules.filling == "dynamic" and len(waiting) < self._slots:
            opens_at = min(s.arrived_at for s in waiting) + self._rules.dynamic_wait
            if now < opens_at:
                self.opens_at = opens_at
                return
        self._batch = set(waiting[: self._slots])

    def lets_in(self, sequence: Sequence) -> bool:
        """Whether this waiting sequence may be admitted now."""
        return self._rules.filling == "continuous" or sequence in self._batch
