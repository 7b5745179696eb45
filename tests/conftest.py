"""What many tests need: a Redis server and a part of it for each test."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Iterator

import pytest
import torch

from queueing.embedded import EmbeddedRedis
from tests.cluster import cluster

__all__ = ["cluster"]

if not torch.cuda.is_available():  # Triton reads it when it is imported, which is later
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of a server for the whole run. Tests share it, each with a `pool` of its own."""
    server = asyncio.run(EmbeddedRedis.start())
    yield server.url
    asyncio.run(server.stop())


@pytest.fixture
def pool() -> str:
    """Name of a pool that nobody else uses."""
    return f"test-{uuid.uuid4().hex[:12]}"
