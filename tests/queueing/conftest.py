"""A pool for each test, on the server that all share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.queueing.pool import Pool


@pytest.fixture
async def cluster(redis_url: str, pool: str) -> AsyncIterator[Pool]:
    cluster = Pool(redis_url, pool)
    yield cluster
    await cluster.close()
