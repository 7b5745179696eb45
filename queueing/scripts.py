"""Runs the Lua scripts on a Redis server. Knows nothing of what they mean."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import cache
from hashlib import sha1
from pathlib import Path
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import NoScriptError, OutOfMemoryError, RedisError

from baton.errors import ConfigError, Overloaded, QueueError
from queueing import keys

SOCKET_TIMEOUT = 0.5  # seconds without an answer
RETRIES = 2  # after a connection error or time-out; safe because every script is idempotent
CALL_SECONDS = 2.0  # for one call in all, retries and reconnecting included
CONNECTIONS = 16

_SCHEMES = ("redis://", "rediss://", "unix://")
_LUA = Path(__file__).parent / "lua"

Clock = Callable[[], float]
"""Seconds; replaces the server's clock in tests."""


def connect(url: str) -> Redis:
    """A client with deadlines on everything. Raises ConfigError for a URL of another kind.

    redis-py's own defaults would try ten times, five seconds each.
    """
    if not url.startswith(_SCHEMES):
        raise ConfigError(f"--redis-url: must start with one of {', '.join(_SCHEMES)}")
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=SOCKET_TIMEOUT,
            decode_responses=True,
            socket_timeout=SOCKET_TIMEOUT,
            socket_connect_timeout=SOCKET_TIMEOUT,
            health_check_interval=5,
            retry=Retry(ExponentialWithJitterBackoff(base=0.01, cap=0.1), RETRIES),
        )
    except ValueError as error:
        raise ConfigError(f"--redis-url: {error}") from error
    return Redis.from_pool(pool)


@cache
def source(name: str) -> str:
    """Full Lua text of one script: key names, library, body."""
    parts = (_LUA / "library.lua", _LUA / f"{name}.lua")
    return "\n".join([keys.lua_names(), *(part.read_text() for part in parts)])


@cache
def _digest(name: str) -> str:
    return sha1(source(name).encode(), usedforsecurity=False).hexdigest()


class Scripts:
    """The scripts of one pool on one server."""

    def __init__(self, url: str, pool: str, clock: Clock | None = None) -> None:
        """Does not connect yet. Raises ConfigError."""
        self._prefix = keys.prefix(pool)
        self._redis = connect(url)
        self._clock = clock

    async def run(self, name: str, *arguments: str | int | float) -> Any:
        """Call a script; its first argument, the time, is added here.

        Raises Overloaded when the server is out of memory and the script needs some, and
        QueueError for everything else that goes wrong.
        """
        now = "" if self._clock is None else round(self._clock() * 1e6)
        parameters = (1, self._prefix, now, *arguments)
        task = asyncio.current_task()
        cancellations = task.cancelling() if task else 0
        try:
            async with asyncio.timeout(CALL_SECONDS):
                try:
                    reply = await self._redis.evalsha(_digest(name), *parameters)  # type: ignore[arg-type]
                except NoScriptError:
                    reply = await self._redis.eval(source(name), *parameters)  # type: ignore[arg-type]
        except (RedisError, OSError) as error:
            # Redis before 7 wraps what a command in a script answered.
            if isinstance(error, OutOfMemoryError) or "-OOM " in str(error):
                raise Overloaded("the queue's memory is full", subject="queue memory") from error
            raise QueueError(f"the queue does not answer ({type(error).__name__})") from error
        if task and task.cancelling() > cancellations:
            # redis-py sends inside asyncio.wait_for, which before Python 3.12 loses a cancellation
            # that comes in the moment the send ends. A task that was cancelled must not go on.
            raise asyncio.CancelledError
        return reply

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()
