"""Collects every bad field of a request before any is reported."""

from __future__ import annotations

import math
from collections.abc import Collection

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from baton.errors import InvalidRequest, Violation

_MAX_VIOLATIONS = 32  # details travel in metadata, which is small


class Fields:
    """Checks fields one by one. Each check returns a usable value even when it records a
    violation, so that the checks after it can go on."""

    def __init__(self) -> None:
        self._violations: list[Violation] = []

    def add(self, path: str, description: str) -> None:
        """Record a violation."""
        self._violations.append(Violation(path, description))

    def include(self, error: InvalidRequest) -> None:
        """Record the violations of an error raised elsewhere."""
        self._violations.extend(error.violations)

    def raise_if_any(self) -> None:
        """Raise InvalidRequest with everything recorded."""
        if self._violations:
            raise InvalidRequest(self._violations[:_MAX_VIOLATIONS])

    def number(
        self,
        message: Message,
        path: str,
        default: float,
        low: float,
        high: float,
        *,
        above_low: bool = False,
    ) -> float:
        """An optional number within [low, high], or (low, high] with `above_low`."""
        name = path.rpartition(".")[2]
        if not message.HasField(name):
            return default
        value = float(getattr(message, name))
        inside = low < value <= high if above_low else low <= value <= high
        if not (math.isfinite(value) and inside):
            left = f"over {low:g}" if above_low else f"at least {low:g}"
            self.add(path, f"must be a number of {left} and at most {high:g}, not {value:g}")
            return default
        return value

    def integer(self, message: Message, path: str, default: int, low: int, high: int) -> int:
        """An optional whole number within [low, high]."""
        name = path.rpartition(".")[2]
        if not message.HasField(name):
            return default
        value = int(getattr(message, name))
        if not low <= value <= high:
            self.add(path, f"must be from {low} to {high}, not {value}")
            return default
        return value

    def optional_integer(self, message: Message, path: str, low: int, high: int) -> int | None:
        """The same, None when unset."""
        if not message.HasField(path.rpartition(".")[2]):
            return None
        return self.integer(message, path, low, low, high)

    def duration(
        self, message: Message, path: str, high: float, *, zero_allowed: bool = False
    ) -> float | None:
        """An optional duration in seconds, at most `high`; None when unset."""
        name = path.rpartition(".")[2]
        if not message.HasField(name):
            return None
        value: Duration = getattr(message, name)
        seconds = value.seconds + value.nanos * 1e-9
        if abs(value.nanos) >= 10**9 or seconds < 0 or (seconds == 0 and not zero_allowed):
            self.add(path, "must be a positive duration")
            return None
        if seconds > high:
            self.add(path, f"must be at most {high:g} s")
            return None
        return seconds

    def label(self, value: str, path: str, max_chars: int) -> str:
        """A string of bounded length."""
        if len(value) > max_chars:
            self.add(path, f"must be at most {max_chars} characters")
            return ""
        return value

    def token_ids(
        self, ids: Collection[int], path: str, vocab_size: int, most: int
    ) -> tuple[int, ...]:
        """Token ids within the vocabulary, at most `most` of them."""
        if len(ids) > most:
            self.add(path, f"has {len(ids)} entries, at most {most} are allowed")
            return ()
        bad = next((token for token in ids if token >= vocab_size), None)
        if bad is not None:
            self.add(path, f"token id {bad} is not in the vocabulary of {vocab_size}")
            return ()
        return tuple(ids)
