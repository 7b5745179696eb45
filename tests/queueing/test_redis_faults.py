"""What becomes of requests when a worker, a gateway or the server fails or goes away."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from baton.errors import Overloaded, QueueError
from baton.types import Claim
from queueing import keys
from queueing.contract import Live, Outcome, Progress, Role, Verdict
from queueing.embedded import EmbeddedRedis
from queueing.settings import QueueSettings
from tests.queueing.pool import IDLE, Pool, record, request


async def test_a_request_ends_in_error_when_its_attempts_are_used_up(cluster: Pool):
    gateway = await cluster.gateway("g", QueueSettings(max_attempts=2))
    await cluster.worker("p")
    await gateway.submit(request("r"))
    target = await record(gateway, "p")
    [one] = await gateway.claim(target, 1)
    assert await gateway.give_back("r", one.claim, 0, fault=True)
    [two] = await gateway.claim(target, 1)
    assert two.claim.attempt == 2
    assert not await gateway.give_back("r", two.claim, 0, fault=True)
    assert await gateway.claim(target, 1) == []


async def test_a_silent_worker_loses_its_requests_to_the_queue_and_their_owner_hears_of_it(
    cluster: Pool,
):
    one, two = await cluster.gateway("g1"), await cluster.gateway("g2")
    prefill = await cluster.worker("p")
    await one.submit(request("r"))
    [claimed] = await one.claim(await record(one, "p"), 1)
    cluster.clock.now += 5.1
    assert (await two.reap()).workers == ("p",)
    assert (await one.reap()).requeued == ("r",)
    assert (await one.reap()).requeued == ()
    assert await prefill.report([Progress("r", claimed.claim.fence, 1, 0.1)], IDLE) is None
    await prefill.register()
    [reply] = await prefill.report([Progress("r", claimed.claim.fence, 1, 0.1)], IDLE) or []
    assert reply.verdict is Verdict.STALE


async def test_news_are_told_again_until_the_gateway_has_heard_them(cluster: Pool, redis_url: str):
    gateway = await cluster.gateway("g")
    prefill = await cluster.worker("p")
    await gateway.submit(request("r"))
    await gateway.claim(await record(gateway, "p"), 1)
    await prefill.deregister()
    restarted = await cluster.gateway("g")  # the first one's reply was lost with it
    assert (await gateway.reap()).requeued == ("r",)
    assert (await restarted.reap()).requeued == ("r",)
    assert (await restarted.reap()).requeued == ()


async def test_requests_of_a_silent_gateway_end_and_their_workers_stop(cluster: Pool):
    dead, alive = await cluster.gateway("dead"), await cluster.gateway("alive")
    decode = await cluster.worker("d", Role.DECODE)
    await dead.submit(request("running"))
    [claimed] = await dead.claim(await record(dead, "d"), 1)
    await dead.submit(request("waiting"))
    for _ in range(3):
        cluster.clock.now += 4
        await alive.heartbeat()
        await decode.report([Progress("running", claimed.claim.fence, 1, 0.1)], IDLE)
    await alive.reap()
    [reply] = await decode.report([Progress("running", claimed.claim.fence, 1, 0.1)], IDLE) or []
    assert reply.verdict is Verdict.CANCELLED
    assert sum(level.requests for level in await alive.depth()) == 0
    assert not await dead.heartbeat()


async def test_a_gateway_that_was_only_slow_has_its_requests_again(cluster: Pool):
    slow, other = await cluster.gateway("slow"), await cluster.gateway("other")
    decode = await cluster.worker("d", Role.DECODE)
    await slow.submit(request("running"))
    [claimed] = await slow.claim(await record(slow, "d"), 1)
    await slow.submit(request("waiting"))
    cluster.clock.now += 11
    await other.heartbeat()
    await decode.register()
    await other.reap()
    assert not await slow.heartbeat()

    live = [
        Live(request("running"), 1, 4, "d", claimed.claim),
        Live(request("waiting"), 0, 0, None, None),
    ]
    assert await slow.reconcile(live) == 2
    assert await slow.reconcile(live) == 0
    [reply] = await decode.report([Progress("running", claimed.claim.fence, 5, 0.1)], IDLE) or []
    assert reply.verdict is Verdict.CONTINUE
    [again] = await slow.claim(await record(slow, "d"), 8)
    assert again.request_id == "waiting"
    cluster.clock.now += 60  # nothing of their first end is left: they do not fade away
    assert await slow.finish("running", Outcome.FINISHED, 9)


async def test_a_draining_worker_gets_nothing_and_one_that_leaves_gives_back_without_blame(
    cluster: Pool,
):
    gateway = await cluster.gateway("g", QueueSettings(max_attempts=1))
    leaving = await cluster.worker("p1")
    await cluster.worker("p2")
    await gateway.submit(request("held"))
    await gateway.claim(await record(gateway, "p1"), 1)
    await leaving.drain()
    await gateway.submit(request("new"))
    assert (await record(gateway, "p1")).draining
    assert await gateway.claim(await record(gateway, "p1"), 1) == []
    await leaving.deregister()
    assert [worker.id for worker in await gateway.workers()] == ["p2"]
    claimed = await gateway.claim(await record(gateway, "p2"), 8)
    assert {(c.request_id, c.claim.attempt) for c in claimed} == {("held", 1), ("new", 1)}


async def test_a_server_that_restarts_empty_is_told_again_who_holds_what(pool: str):
    server = await EmbeddedRedis.start(options=["--appendonly", "no"])
    cluster = Pool(server.url, pool)
    try:
        gateway = await cluster.gateway("g")
        decode = await cluster.worker("d", Role.DECODE)
        await gateway.submit(request("running"))
        [claimed] = await gateway.claim(await record(gateway, "d"), 1)
        async with Redis.from_url(server.url) as raw:
            await raw.flushall()
            await raw.connection_pool.disconnect()
        cluster.clock.now += 1

        running = Progress("running", claimed.claim.fence, 4, 0.1)
        assert await decode.report([running], IDLE) is None
        assert not await gateway.heartbeat()
        live = [
            Live(request("running"), 1, 4, "d", claimed.claim),
            Live(request("waiting"), 2, 0, None, None),
        ]
        assert await gateway.reconcile(live) == 2
        assert await gateway.reconcile(live) == 0
        await decode.register()
        [reply] = await decode.report([running], IDLE) or []
        assert (reply.verdict, reply.level) == (Verdict.CONTINUE, 1)
        assert await gateway.heartbeat()

        [waiting] = await gateway.claim(await record(gateway, "d"), 8)
        assert (waiting.request_id, waiting.level) == ("waiting", 2)
        assert waiting.claim.fence > claimed.claim.fence
        assert await gateway.finish("running", Outcome.FINISHED, 9, claimed.claim)
    finally:
        await cluster.close()
        await server.stop()


async def test_a_submission_that_finds_the_data_lost_makes_the_next_heartbeat_say_so(
    cluster: Pool, redis_url: str
):
    gateway = await cluster.gateway("g")
    async with Redis.from_url(redis_url) as raw:
        await raw.delete(keys.key(cluster.name, "gateways"), keys.key(cluster.name, "config"))
        await raw.connection_pool.disconnect()
    assert await gateway.submit(request("r")) == 0
    assert not await gateway.heartbeat()
    assert await gateway.heartbeat()


async def test_a_full_server_refuses_submissions_and_lets_everything_else_go_on(pool: str):
    server = await EmbeddedRedis.start()
    cluster = Pool(server.url, pool)
    raw = Redis.from_url(server.url)
    try:
        gateway = await cluster.gateway("g")
        prefill = await cluster.worker("p")
        await cluster.worker("d", Role.DECODE)
        for i in range(4):
            await gateway.submit(request(f"r{i}"))
        await raw.config_set("maxmemory", 1)

        with pytest.raises(Overloaded) as caught:
            await gateway.submit(request("more"))
        assert caught.value.subject == "queue memory"
        claimed = await gateway.claim(await record(gateway, "p"), 3)
        assert len(claimed) == 3
        for one in claimed:
            assert await prefill.report([Progress(one.request_id, one.claim.fence, 0, 0.1)], IDLE)
        first, second, third = claimed
        decode = await record(gateway, "d")
        assert await gateway.handoff(first.request_id, first.claim, decode)
        assert await gateway.give_back(second.request_id, second.claim, 0, fault=False)
        assert await gateway.finish(third.request_id, Outcome.FINISHED, 1)
        assert await gateway.heartbeat()
        await prefill.register()
        cluster.clock.now += 6
        assert set((await gateway.reap()).workers) == {"p", "d"}
        await prefill.register()
        await prefill.drain()
        await prefill.deregister()
        assert await gateway.promote() == 2

        await raw.config_set("maxmemory", 0)
        await gateway.submit(request("more"))
    finally:
        await raw.aclose()
        await cluster.close()
        await server.stop()


async def test_a_server_that_is_gone_or_frozen_is_a_queue_error_in_bounded_time(pool: str):
    server = await EmbeddedRedis.start()
    cluster = Pool(server.url, pool)
    gateway = await cluster.gateway("g")
    loop = asyncio.get_running_loop()
    try:
        async with Redis.from_url(server.url) as raw:
            await raw.execute_command("CLIENT", "PAUSE", 30_000)
            await raw.connection_pool.disconnect()
        began = loop.time()
        with pytest.raises(QueueError):
            await gateway.finish("r", Outcome.CANCELLED, 0, Claim(1))
        assert loop.time() - began < 3
    finally:
        await server.stop()
    with pytest.raises(QueueError):
        await gateway.heartbeat()
    await cluster.close()
