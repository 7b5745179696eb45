"""The queue's server goes away and comes back, with its data or without."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from baton.client import Client, Text
from baton.errors import Unavailable
from queueing.embedded import EmbeddedRedis


@pytest.fixture
async def own_redis():
    """A server that the test may stop."""
    server = await EmbeddedRedis.start()
    yield server
    await server.stop()


@pytest.fixture
def redis_url(own_redis) -> str:
    return own_redis.url


async def test_running_streams_go_on_and_new_requests_are_told_to_come_back(
    pair, own_redis, expected
):
    pair.d.step = 0.01
    stream = pair.client.generate("hello", max_tokens=120)
    text = ""
    stopped = False
    async for event in stream:
        if isinstance(event, Text):
            text += event.text
            if len(text) > 5 and not stopped:
                stopped = True
                await own_redis.stop()
                with pytest.raises(Unavailable) as caught:
                    await pair.client.generate_unary("hello", max_tokens=1)
                assert caught.value.retry_after > 0
    assert text == expected(120)


async def test_a_hand_off_waits_for_a_server_that_is_back_soon(
    pair, own_redis, expected, eventually
):
    pair.p.delay = 0.3
    answer = asyncio.create_task(pair.client.generate_unary("hello", max_tokens=30))
    await eventually(lambda: bool(pair.p.requests))
    os.kill(own_redis.pid, signal.SIGSTOP)
    await asyncio.sleep(3)  # one call gives up after 2
    os.kill(own_redis.pid, signal.SIGCONT)
    assert (await answer).text == expected(30)
    assert len(pair.d.started) == 1


async def test_a_server_that_lost_its_data_is_told_what_there_is(
    pair, own_redis, expected, eventually
):
    from redis.asyncio import Redis

    pair.d.step = 0.02
    answer = asyncio.create_task(pair.client.generate_unary("hello", max_tokens=150))
    await eventually(lambda: bool(pair.d.held))
    async with Redis.from_url(own_redis.url) as redis:
        await redis.flushall()
    other = Client(pair.server.address)
    assert (await other.generate_unary("hello", max_tokens=5)).text == expected(5)
    await other.close()
    assert (await answer).text == expected(150)
    assert len(pair.d.started) == 2  # the running one was not started anew
