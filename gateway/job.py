"""A valid request: what the engine must do, and what only the gateway does with the output."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.types import Request
from scheduling.length import Prediction


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """Which optional parts the client wants, and how often."""

    text: bool = True
    token_ids: bool = False
    timing: bool = False
    skip_special_tokens: bool = True
    stream_interval: int = 1  # tokens per delta after the first


def tenant_key(tenant: str) -> str:
    """What workers know a tenant by, the same from all gateways."""
    return hashlib.blake2b(tenant.encode(), digest_size=8, person=b"baton tenant").hexdigest()


@dataclass(frozen=True, slots=True)
class Job:
    """A tokenized request with every default resolved. Durations are in seconds."""

    request: Request
    tenant: str
    queue_timeout: float
    time_limit: float | None = None  # soft: the partial output is kept
    stop_strings: tuple[str, ...] = ()
    include_stop: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)  # for the log
    response: ResponseFormat = ResponseFormat()
    prediction: Prediction | None = None  # of the length of each output, to learn from
