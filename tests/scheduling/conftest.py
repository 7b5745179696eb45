"""What the scheduler tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from baton.types import Request, Sampling, Stopping
from scheduling.plan import Capacity
from tests.scheduling.worker import Worker

MakeRequest = Callable[..., Request]


@pytest.fixture(scope="session")
def make_request() -> MakeRequest:
    """Builds a request of `prompt` arbitrary tokens that generates `most` tokens."""

    def make(id: str, prompt: int, most: int = 4, n: int = 1, **fields: Any) -> Request:
        stopping = Stopping(
            max_tokens=most,
            eos_token_ids=fields.pop("eos", frozenset()),
            stop_token_ids=fields.pop("stop", frozenset()),
        )
        ids = tuple((position * 7 + prompt) % 1000 for position in range(prompt))
        return Request(id, ids, Sampling(n=n), stopping, **fields)

    return make


@pytest.fixture
def capacity() -> Capacity:
    """Sixteen blocks of four tokens; passes of at most eight tokens and four sequences."""
    return Capacity(blocks=16, block_size=4, max_tokens=8, max_sequences=4, max_context=64)


@pytest.fixture
def worker(capacity: Capacity) -> Worker:
    """A decode scheduler, first come first served, with an executor."""
    return Worker(capacity)
