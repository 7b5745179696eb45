"""The value that length predictors share, on a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from baton.errors import QueueError
from queueing import keys
from queueing.lengths import LengthsExchange, SharedLengths


@pytest.fixture
async def exchange(redis_url: str, pool: str) -> AsyncIterator[LengthsExchange]:
    exchange = LengthsExchange(redis_url, pool, "one")
    yield exchange
    await exchange.close()


async def test_nothing_is_there_at_first(exchange: LengthsExchange) -> None:
    assert await exchange.read(0) == SharedLengths(0, None)


async def test_what_was_written_is_read(exchange: LengthsExchange) -> None:
    data = bytes(range(256)) * 1000
    assert await exchange.write(0, data) == 1
    assert await exchange.read(0) == SharedLengths(1, data)
    assert await exchange.read(1) == SharedLengths(1, None)


async def test_a_write_over_a_version_that_is_gone_is_refused(exchange: LengthsExchange) -> None:
    assert await exchange.write(0, b"a") == 1
    assert await exchange.write(0, b"b") is None
    assert await exchange.write(1, b"c") == 2
    assert await exchange.read(0) == SharedLengths(2, b"c")


async def test_shapes_do_not_touch_each_other(
    exchange: LengthsExchange, redis_url: str, pool: str
) -> None:
    other = LengthsExchange(redis_url, pool, "two")
    try:
        await exchange.write(0, b"a")
        assert await other.read(0) == SharedLengths(0, None)
    finally:
        await other.close()


async def test_a_retry_of_a_write_whose_reply_was_lost_is_told_that_it_was_done(
    exchange: LengthsExchange,
) -> None:
    arguments = ("one", "nonce", 0, 1000, "YQ==")
    assert await exchange._scripts.run("lengths_write", *arguments) == [1, 1]
    assert await exchange._scripts.run("lengths_write", *arguments) == [1, 1]


async def test_a_value_that_nobody_writes_goes_away(
    exchange: LengthsExchange, redis_url: str, pool: str
) -> None:
    await exchange.write(0, b"a")
    redis = Redis.from_url(redis_url)
    try:
        assert 0 < await redis.ttl(keys.key(pool, "lengths", "one")) <= 7 * 24 * 3600
    finally:
        await redis.aclose()


async def test_damaged_data_is_an_error_of_the_queue(
    exchange: LengthsExchange, redis_url: str, pool: str
) -> None:
    await exchange.write(0, b"a")
    redis = Redis.from_url(redis_url)
    try:
        await redis.hset(keys.key(pool, "lengths", "one"), "data", "a")
    finally:
        await redis.aclose()
    with pytest.raises(QueueError, match="damaged"):
        await exchange.read(0)


async def test_a_server_that_is_away_is_an_error_of_the_queue(tmp_path: Path) -> None:
    exchange = LengthsExchange(f"unix://{tmp_path}/nobody", "p", "one")
    try:
        with pytest.raises(QueueError):
            await exchange.read(0)
    finally:
        await exchange.close()
