"""What gateways tell each other of prefix caches, on real servers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from redis.asyncio import Redis

from baton.errors import Overloaded, QueueError
from queueing import keys
from queueing.embedded import EmbeddedRedis, find_servers
from queueing.prefixes import KEEP_SECONDS, PrefixExchange, WorkerKeys
from tests.queueing.pool import IDLE, Pool, request

A, B, C, D, E = (bytes([i]) * 16 for i in (0, 1, 62, 250, 255))


@pytest.fixture
async def exchange(cluster: Pool) -> AsyncIterator[Callable[..., PrefixExchange]]:
    """Makes gateways' sides of the map."""
    made = []

    def make(**limits: int) -> PrefixExchange:
        made.append(PrefixExchange(cluster.url, cluster.name, clock=cluster.clock, **limits))
        return made[-1]

    yield make
    for one in made:
        await one.close()


def heard(worker: str, epoch: int, *oldest_first: bytes) -> list[WorkerKeys]:
    return [WorkerKeys(worker, epoch, oldest_first)]


async def test_what_one_gateway_tells_another_hears_once(cluster: Pool, exchange):
    epoch = await (await cluster.worker("w")).register()
    one, two = exchange(), exchange()
    assert await one.exchange({("w", epoch): [A, B, C]}) == []
    cluster.clock.now += 0.25
    assert await two.exchange({("w", epoch): [D]}) == heard("w", epoch, C, B, A)
    cluster.clock.now += 0.25
    for side, news in ((one, (C, B, A, D)), (two, (D,))):
        assert await side.exchange({}) == heard("w", epoch, *news)
        assert await side.exchange({}) == []
    assert await exchange().exchange({}) == heard("w", epoch, C, B, A, D)


async def test_workers_do_not_mix(cluster: Pool, exchange):
    epochs = {id: await (await cluster.worker(id)).register() for id in ("v", "w")}
    told = {("v", epochs["v"]): [A], ("gone", 1): [B], ("w", epochs["w"]): [C, D]}
    await exchange().exchange(told)
    got = {one.worker: one for one in await exchange().exchange({})}
    assert got == {
        "v": WorkerKeys("v", epochs["v"], (A,)),
        "w": WorkerKeys("w", epochs["w"], (D, C)),
    }


@pytest.mark.parametrize("how", ["restarts", "leaves", "dies"])
async def test_what_a_worker_had_goes_with_it(cluster: Pool, exchange, how: str, redis_url: str):
    gateway = await cluster.gateway("g")
    worker = await cluster.worker("w")
    epoch = await worker.register()
    one = exchange()
    await one.exchange({("w", epoch): [A]})
    match how:
        case "restarts":
            await worker.register()
        case "leaves":
            await worker.deregister()
        case "dies":
            cluster.clock.now += 5.1
            await gateway.reap()
    await exchange().exchange({("w", epoch): [B]})
    assert await exchange().exchange({}) == []
    async with Redis.from_url(redis_url) as raw:
        assert not await raw.exists(keys.key(cluster.name, "prefixes", "w"))
        await raw.connection_pool.disconnect()


async def test_the_map_is_bounded_and_drops_ends_before_beginnings(cluster: Pool, exchange):
    epoch = await (await cluster.worker("w")).register()
    one = exchange(most=4)
    await one.exchange({("w", epoch): [A, B, C]})
    cluster.clock.now += 1
    await one.exchange({("w", epoch): [D, E]})
    assert await exchange().exchange({}) == heard("w", epoch, B, A, E, D)
    await cluster.worker("v")  # which gets half of it
    cluster.clock.now += 1
    await one.exchange({("w", epoch): [A]})
    assert await exchange().exchange({}) == heard("w", epoch, D, A)
    assert await exchange(most_read=2).exchange({}) == heard("w", epoch, A)


async def test_more_keys_than_fit_one_command_are_told(cluster: Pool, exchange):
    epoch = await (await cluster.worker("w")).register()
    many = [number.to_bytes(16, "little") for number in range(1000)]
    await exchange().exchange({("w", epoch): many})
    assert await exchange().exchange({}) == heard("w", epoch, *reversed(many))


async def test_what_nobody_tells_again_goes_away(cluster: Pool, exchange, redis_url: str):
    worker = await cluster.worker("w")
    epoch = await worker.register()
    one = exchange()
    await one.exchange({("w", epoch): [A, B]})
    async with Redis.from_url(redis_url) as raw:
        assert 0 < await raw.ttl(keys.key(cluster.name, "prefixes", "w")) <= KEEP_SECONDS
        await raw.connection_pool.disconnect()
    half = KEEP_SECONDS / 2
    for news in ([A], [C]):
        cluster.clock.now += half + 1
        await worker.report([], IDLE)
        await one.exchange({("w", epoch): news})
    assert await exchange().exchange({}) == heard("w", epoch, A, C)


@pytest.mark.parametrize("binary", find_servers(), ids=lambda binary: binary.name)
async def test_a_full_server_keeps_its_memory_for_requests(pool: str, binary: Path):
    server = await EmbeddedRedis.start(binary)
    cluster = Pool(server.url, pool)
    one = PrefixExchange(server.url, pool, clock=cluster.clock)
    raw = Redis.from_url(server.url)
    try:
        gateway = await cluster.gateway("g")
        epoch = await (await cluster.worker("w")).register()
        await one.exchange({("w", epoch): [A]})
        await raw.config_set("maxmemory", 1)
        with pytest.raises(Overloaded):
            await gateway.submit(request("r"))
        other = PrefixExchange(server.url, pool, clock=cluster.clock)
        assert await other.exchange({("w", epoch): [B]}) == heard("w", epoch, A)
        await other.close()
        await raw.config_set("maxmemory", 0)
        cluster.clock.now += 1
        await one.exchange({("w", epoch): [C]})
        cluster.clock.now += 1
        assert await one.exchange({}) == heard("w", epoch, C)
    finally:
        await raw.aclose()
        await one.close()
        await cluster.close()
        await server.stop()


async def test_damaged_keys_are_an_error_of_the_queue(cluster: Pool, exchange, redis_url: str):
    await cluster.worker("w")
    async with Redis.from_url(redis_url) as raw:
        await raw.zadd(keys.key(cluster.name, "prefixes", "w"), {"a": 1})
        await raw.connection_pool.disconnect()
    with pytest.raises(QueueError, match="damaged"):
        await exchange().exchange({})


async def test_a_server_that_is_away_is_an_error_of_the_queue(tmp_path: Path):
    one = PrefixExchange(f"unix://{tmp_path}/nobody", "p")
    with pytest.raises(QueueError):
        await one.exchange({("w", 1): [A]})
    await one.close()
