"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scan:
    """Text that may be shown now; `matched` is the stop string that ended it, if one did."""

    text: str
    matched: str | None = None


class StopMatcher:
    """Finds the first stop string to be completed, wherever the pieces are cut.

    Of several completed by the same character the longest wins. Text that may be the beginning
    of a stop string is held back until it is known not to be (Knuth, Morris and Pratt 1977:
    constant work per character and stop string).
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include` keeps the match in the text. No stop may be empty."""
        self._stops = tuple(stops)
        self._include = include
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)  # characters of each stop that the text ends with
        self._held = ""

    def push(self, text: str) -> Scan:
        """Add a piece. After a match nothing more may be pushed."""
        if not self._stops:
            return Scan(text)
        for position, char in enumerate(text):
            matched = self._step(char)
            if matched is not None:
                seen = self._held + text[: position + 1]
                self._held = ""
                return Scan(seen if self._include else seen[: -len(matched)], matched)
        seen = self._held + text
        cut = len(seen) - max(self._states)
        self._held = seen[cut:]
        return Scan(seen[:cut])

    def flush(self) -> str:
        """The text held back, at the end."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str | None:
        """Advance every stop by one character; the longest one that is complete."""
        matched: str | None = None
        for i, stop in enumerate(self._stops):
            state = self._states[i]
            while state and stop[state] != char:
                state = self._fallbacks[i][state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                if matched is None or len(stop) > len(matched):
                    matched = stop
                state = self._fallbacks[i][state - 1]
            self._states[i] = state
        return matched


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that also ends it."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        if stop[i] == stop[length]:
            length += 1
        table[i] = length
    return table
