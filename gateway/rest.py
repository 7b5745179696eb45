"""When a worker is left alone for a while."""

from __future__ import annotations

BUSY_SECONDS = 0.05
FAULT_SECONDS = 0.1
MAX_FAULT_SECONDS = 2.0


class Rest:
    """After a refusal for lack of room: briefly, and its requests wait for it. After a fault:
    twice as long each time, and its requests go elsewhere."""

    def __init__(self) -> None:
        self._busy_until = 0.0
        self._faulty_until = 0.0
        self._faults = 0

    def busy(self, now: float) -> None:
        """It had no room."""
        self._busy_until = now + BUSY_SECONDS

    def fault(self, now: float) -> None:
        """It failed."""
        self._faulty_until = now + min(FAULT_SECONDS * 2**self._faults, MAX_FAULT_SECONDS)
        self._faults += 1

    def well(self) -> None:
        """It did what it was asked."""
        self._faults = 0

    def is_faulty(self, now: float) -> bool:
        """It failed lately."""
        return now < self._faulty_until

    def is_resting(self, now: float) -> bool:
        """It should be given nothing now."""
        return now < max(self._busy_until, self._faulty_until)
