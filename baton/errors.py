"""Every error that Baton raises on purpose, and the gRPC status each one becomes.

    BatonError
    ├── InvalidRequest      INVALID_ARGUMENT + BadRequest    the caller must change the request
    ├── NotFound            NOT_FOUND + ResourceInfo         no such model, request, worker
    ├── AlreadyExists       ALREADY_EXISTS                   request id in use
    ├── Overloaded          RESOURCE_EXHAUSTED + RetryInfo   queue, quota or KV is full: try later
    ├── Unavailable         UNAVAILABLE + RetryInfo          no workers, no Redis: try later
    ├── Unsupported         UNIMPLEMENTED                    known to the API, not to this server
    ├── DeadlineExceeded    DEADLINE_EXCEEDED                the caller's deadline passed
    ├── Aborted             CANCELLED                        ended by the Abort RPC
    ├── ModelError          (start-up only)                  the model directory cannot be served
    ├── ConfigError         (start-up only)                  the configuration makes no sense
    ├── QueueError          UNAVAILABLE + RetryInfo          Redis failed or answered nonsense
    ├── EngineFailed        INTERNAL                         the pass that the request was in broke
    └── KvTransferError     (between workers)                the hand-off failed: recompute

The mapping lives in baton/rpc.py, in one interceptor. Anything else that escapes a handler becomes
INTERNAL without its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class BatonError(Exception):
    """Base of all of them. `str(error)` is safe to show to a client."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One bad field: its path in the public request (`sampling.top_p`), empty if it is not known
    or all of it, and what is wrong."""

    field: str
    description: str


class InvalidRequest(BatonError):
    """The request breaks a documented bound; names every bad field at once."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__(
            "; ".join(f"{v.field}: {v.description}".removeprefix(": ") for v in self.violations)
        )

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequest:
        """An error about one field."""
        return cls([Violation(field, description)])


class NotFound(BatonError):
    """`kind` ("model", "request", "worker") named `name` does not exist here."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name
        super().__init__(f"no such {kind}: {name!r}")


class AlreadyExists(BatonError):
    """A live request has this id."""


class Overloaded(BatonError):
    """No room now. `retry_after` in seconds; `subject` names what is exhausted."""

    def __init__(self, message: str, *, subject: str, retry_after: float = 1.0) -> None:
        self.subject, self.retry_after = subject, retry_after
        super().__init__(message)


class Unavailable(BatonError):
    """A part that is needed is not there now. `retry_after` in seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class QueueError(Unavailable):
    """Redis cannot be reached, or answered what it should not."""


class Unsupported(BatonError):
    """A feature of the API that this server does not have."""


class DeadlineExceeded(BatonError):
    """The caller's deadline passed before the end."""


class Aborted(BatonError):
    """Ended by the Abort RPC."""


class ModelError(BatonError):
    """A model directory that is missing, damaged, unsafe or not supported. Raised at load."""


class ConfigError(BatonError):
    """Configuration that cannot work. Raised at start, names the flag."""


class EngineFailed(BatonError):
    """The pass that a request was in broke, and the request with it."""


class KvTransferError(BatonError):
    """KV blocks could not be had whole, verified and in time. The consumer recomputes them."""
