"""Scripts over a real connection that misbehaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from baton.errors import QueueError
from baton.types import Load
from queueing import keys
from queueing.contract import Outcome, Progress, Registration, Role, Submission
from queueing.redis_queue import RedisGatewayQueue, RedisWorkerQueue
from queueing.scripts import source


class Cutter:
    """A proxy on a unix socket that can swallow a reply and cut the connection instead."""

    def __init__(self, directory: Path, upstream: str) -> None:
        self.path, self._upstream = directory / "s", upstream
        self.cut_next_reply = False
        self.cuts = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # the transports close in callbacks

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        up_reader, up_writer = await asyncio.open_unix_connection(self._upstream)
        up = asyncio.create_task(self._pump(reader, up_writer))
        try:
            while data := await up_reader.read(65536):
                if self.cut_next_reply:
                    self.cut_next_reply = False
                    self.cuts += 1
                    return
                writer.write(data)
        finally:
            up.cancel()
            for end in (writer, up_writer):
                end.transport.abort()  # at once: `stop` may cancel any wait
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.write_eof()


@pytest.fixture
async def cutter(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cutter]:
    proxy = Cutter(tmp_path_factory.mktemp("c"), redis_url.removeprefix("unix://"))
    await proxy.start()
    yield proxy
    await proxy.stop()


async def test_a_lost_reply_changes_neither_the_answer_nor_the_state(cutter: Cutter, pool: str):
    url = f"unix://{cutter.path}"
    gateway = RedisGatewayQueue(url, pool, "g")
    prefill, decode = (
        RedisWorkerQueue(url, pool, Registration(id, role, f"{id}:1", "l", "m", 1000, 8, 4096))
        for id, role in (("p", Role.PREFILL), ("d", Role.DECODE))
    )

    def lose() -> None:
        assert not cutter.cut_next_reply
        cutter.cut_next_reply = True

    await gateway.depth()  # connected, so that the next reply is the script's
    lose()
    assert not await gateway.heartbeat()
    assert await gateway.heartbeat()
    for queue in (prefill, decode):
        await queue.drain()
        lose()
        await queue.register()
    workers = {worker.id: worker for worker in await gateway.workers()}
    lose()
    assert await gateway.submit(Submission("r", "t", 10, 10)) == 0
    lose()
    [claimed] = await gateway.claim(workers["p"], 4)
    lose()
    handed = await gateway.handoff("r", claimed.claim, workers["d"])
    assert handed is not None
    lose()
    [reply] = await decode.report([Progress("r", handed.fence, 3, 0.06)], Load(1, 0, 7, 8)) or []
    assert reply.level == 1  # charged once
    lose()
    assert await gateway.give_back("r", handed, 3, fault=True)
    [again] = await gateway.claim(workers["d"], 4)
    assert (again.request_id, again.claim.attempt) == ("r", 2)
    lose()
    assert await gateway.finish("r", Outcome.FINISHED, 5)
    assert not await gateway.finish("r", Outcome.FINISHED, 5)
    assert cutter.cuts == 9

    for queue in (gateway, prefill, decode):
        await queue.close()


async def test_scripts_that_the_server_forgot_are_loaded_again(redis_url: str, pool: str):
    gateway = RedisGatewayQueue(redis_url, pool, "g")
    await gateway.heartbeat()
    async with Redis.from_url(redis_url) as raw:
        await raw.script_flush()
        await raw.connection_pool.disconnect()
    assert await gateway.heartbeat()
    await gateway.close()


async def test_nonsense_from_the_server_is_a_queue_error(redis_url: str, pool: str):
    gateway = RedisGatewayQueue(redis_url, pool, "g")
    await gateway.heartbeat()
    async with Redis.from_url(redis_url) as raw:
        await raw.delete(keys.key(pool, "gateways"))
        await raw.set(keys.key(pool, "gateways"), "not a set")
        await raw.connection_pool.disconnect()
    with pytest.raises(QueueError):
        await gateway.heartbeat()
    await gateway.close()


@pytest.mark.parametrize(
    "script", ["claim", "finish", "give_back", "handoff", "heartbeat", "prefixes", "reap"]
)
def test_every_key_in_a_script_comes_from_the_table(script: str):
    body = source(script).split("local function whole", 1)[1]
    assert keys.prefix("p") == "baton:{p}:"
    assert "baton:" not in body
    assert body.count("PREFIX") == 1  # the name that drain_first() frees, which never exists
