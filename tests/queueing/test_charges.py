"""What a tenant's lane pays: the expected service, until it is known what it was."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from queueing import keys
from queueing.contract import Live, Outcome, Progress, Submission
from tests.queueing.pool import FCFS, IDLE, Line, Pool


async def test_a_tenant_whose_outputs_are_longer_than_expected_gets_no_more_than_its_share(
    cluster: Pool,
):
    line = await Line.of(cluster, FCFS)
    long = {"cost": 0.5, "token_cost": 0.05, "expected_tokens": 10}
    for _ in range(40):
        await line.come("long", **long)
        await line.come("short", **long)
    served = []
    for _ in range(25):
        [id] = await line.take(1)
        served.append(id)
        tokens = 40 if id.startswith("long") else 10  # 2.0 s and 0.5 s
        assert await line.gateway.finish(id, Outcome.FINISHED, tokens)
    assert sum(id.startswith("long") for id in served) == pytest.approx(5, abs=1)


async def test_a_tenant_whose_outputs_are_shorter_than_expected_gets_its_share(cluster: Pool):
    line = await Line.of(cluster, FCFS)
    for _ in range(40):
        await line.come("wary", cost=2.0, token_cost=0.05, expected_tokens=40)
        await line.come("short", cost=0.5)
    served = []
    for _ in range(24):
        [id] = await line.take(1)
        served.append(id)
        assert await line.gateway.finish(id, Outcome.FINISHED, 10)
    assert sum(id.startswith("wary") for id in served) == pytest.approx(12, abs=2)


async def test_output_beyond_the_expected_is_paid_for_while_it_comes(cluster: Pool):
    line = await Line.of(cluster, FCFS)
    for _ in range(9):
        await line.come("a", cost=0.5, token_cost=0.05, expected_tokens=10)
        await line.come("b", cost=0.5)
    mine, _ = await line.take(2, "d")
    assert mine.startswith("a")
    worker, fence = cluster.queues["d"], line.claims[mine].claim.fence
    for _ in range(2):  # the second one is no news
        assert await worker.report([Progress(mine, fence, 70, 1.0)], IDLE)
    assert [id[0] for id in await line.take(8)] == ["b"] * 6 + ["a", "b"]  # 3 s were unexpected


async def test_no_request_costs_more_than_the_longest_output(cluster: Pool, redis_url: str):
    line = await Line.of(cluster, FCFS)
    await line.come("a")
    mine = await line.come("a", cost=0.5, token_cost=0.05, expected_tokens=10)
    await line.take(2, "d")
    entry = Progress(mine, line.claims[mine].claim.fence, 10**15, 1.0)
    assert await cluster.queues["d"].report([entry], IDLE)
    async with Redis.from_url(redis_url) as raw:
        tag = await raw.hget(keys.key(cluster.name, "lane", "0/a"), "tag")
        await raw.connection_pool.disconnect()
    assert int(tag) == 500_000 + 500_000 + (100 - 10) * 50_000  # max_tokens is 100


async def test_what_was_charged_too_much_before_an_idle_time_is_not_saved_up(cluster: Pool):
    line = await Line.of(cluster, FCFS)
    mine = await line.come("b", cost=5.0, token_cost=0.05, expected_tokens=100)
    for _ in range(40):
        await line.come("a")
    await line.take(20)  # b is idle, and 5 s ahead
    for _ in range(10):
        await line.come("b")
    assert await line.gateway.finish(mine, Outcome.CANCELLED, 0)
    assert sum(id.startswith("b") for id in await line.take(8)) <= 5


async def test_a_correction_finds_no_lane_and_makes_none(cluster: Pool, redis_url: str):
    line = await Line.of(cluster, FCFS)
    mine = await line.come("a", cost=0.5, token_cost=0.05, expected_tokens=10)
    await line.take(1, "d")
    lane = keys.key(cluster.name, "lane", "0/a")
    async with Redis.from_url(redis_url) as raw:
        await raw.delete(lane)  # lost
        entry = Progress(mine, line.claims[mine].claim.fence, 90, 1.0)
        assert await cluster.queues["d"].report([entry], IDLE)
        assert not await raw.exists(lane)
        assert await line.gateway.finish(mine, Outcome.FINISHED, 90)
        assert not await raw.exists(lane)
        await raw.connection_pool.disconnect()


async def test_after_a_loss_of_data_a_claimed_request_costs_what_it_has_generated(
    cluster: Pool, redis_url: str
):
    line = await Line.of(cluster, FCFS)
    mine = await line.come("a", cost=0.5, token_cost=0.05, expected_tokens=10)
    await line.take(1, "d")
    told = Submission(mine, "a", 10, 100, cost=0.5, token_cost=0.05, expected_tokens=10)
    live = Live(told, 0, 50, "d", line.claims[mine].claim)
    lane = keys.key(cluster.name, "lane", "0/a")
    async with Redis.from_url(redis_url) as raw:
        names = [name async for name in raw.scan_iter(f"{keys.prefix(cluster.name)}*")]
        await raw.delete(*names)
        await line.gateway.heartbeat()
        assert await line.gateway.reconcile([live]) == 1
        assert int(await raw.hget(lane, "tag")) == 500_000 + 40 * 50_000
        await line.come("a")
        assert await line.gateway.finish(mine, Outcome.FINISHED, 70)
        assert int(await raw.hget(lane, "tag")) == 500_000 + 60 * 50_000
        await raw.connection_pool.disconnect()
