"""How fast a count grows."""

from __future__ import annotations

from collections import deque


class Rate:
    """Growth per second of a count that somebody looks at often, over the last few seconds."""

    def __init__(self, window: float = 5.0) -> None:
        """`window` in seconds."""
        self._window = window
        self._samples: deque[tuple[float, int]] = deque()  # time and count, oldest first

    def update(self, count: int, now: float) -> float:
        """Take the count as it is `now`, in seconds on the caller's clock; returns the rate."""
        self._samples.append((now, count))
        while len(self._samples) > 2 and now - self._samples[1][0] >= self._window:
            self._samples.popleft()
        since, before = self._samples[0]
        return (count - before) / (now - since) if now > since else 0.0
