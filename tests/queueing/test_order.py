"""Who is next: tenants in turn, the policy within, deadlines, and what survives a loss of data."""

from __future__ import annotations

from dataclasses import replace

import pytest
from redis.asyncio import Redis

from queueing import keys
from queueing.contract import Live, Outcome, Progress, Role, Submission
from queueing.redis_queue import RedisGatewayQueue
from queueing.settings import QueueSettings
from tests.queueing.pool import FCFS, FEW_LEVELS, IDLE, Line, Pool, record

SKIP_JOIN = replace(FEW_LEVELS, fairness_slack=0.5, promote_after=1e6)


@pytest.mark.parametrize("together", [True, False])
async def test_a_flood_of_one_tenant_does_not_delay_anothers(cluster: Pool, together: bool):
    line = await Line.of(cluster, FCFS)
    for _ in range(50):
        await line.come("a")
    assert len(await line.take(10)) == 10
    two = [await line.come("b"), await line.come("b")]
    third = await line.come("c")
    take = line.take_together if together else line.take
    served = await take(8)
    assert all(served.index(id) < 8 for id in (*two, third))
    assert served.index(two[0]) <= 2 and served.index(third) <= 2


async def test_one_tenant_alone_is_served_in_the_order_of_the_policy(cluster: Pool):
    line = await Line.of(cluster, FCFS)
    came = [await line.come("a", cost=cost) for cost in (9.0, 0.1, 5.0, 0.1, 0.1, 3.0)]
    assert await line.take(3) == came[:3]
    came.append(await line.come("a", cost=0.1))
    assert await line.take(9) == came[3:]


async def test_tenants_get_equal_service_not_equal_numbers(cluster: Pool):
    line = await Line.of(cluster, FCFS)
    for _ in range(40):
        await line.come("long", cost=2.0)
        await line.come("short", cost=0.5)
    served = await line.take(25)
    assert sum(id.startswith("long") for id in served) == pytest.approx(5, abs=1)


async def test_an_idle_tenant_saves_nothing_up(cluster: Pool):
    line = await Line.of(cluster, FCFS)
    kept = await line.come("b")
    for _ in range(60):
        await line.come("a")
    assert kept in await line.take(40)  # b is idle from here on
    for _ in range(10):
        await line.come("b")
    served = await line.take(12)
    assert sum(id.startswith("b") for id in served) <= 7


async def test_short_prompts_of_a_flood_do_not_starve_another_tenants_long_one(cluster: Pool):
    line = await Line.of(cluster, SKIP_JOIN)
    for _ in range(30):
        await line.come("a", prompt=1)
    long = await line.come("b", prompt=1000)
    served = await line.take(4)
    assert long in served  # level 0 is not empty yet, and nobody was promoted


async def test_tenants_with_equal_service_stand_in_the_order_of_the_policy(cluster: Pool):
    line = await Line.of(cluster, SKIP_JOIN)
    long = await line.come("a", prompt=1000, cost=0.1)
    short = await line.come("b", prompt=1, cost=0.1)
    middle = await line.come("c", prompt=200, cost=0.1)
    assert await line.take(3) == [short, middle, long]


async def test_priority_goes_before_turns(cluster: Pool):
    line = await Line.of(cluster, FCFS)
    await line.come("b")
    high = [await line.come("a", priority=1) for _ in range(5)]
    assert await line.take(5) == high


async def test_a_handicap_lets_younger_ones_pass_and_no_more_than_that(cluster: Pool):
    line = await Line.of(cluster, QueueSettings(policy="predicted-srpt"))
    long = await line.come("a", handicap=3.0)
    short = await line.come("a", handicap=0.1)
    cluster.clock.now += 2
    later = await line.come("a", handicap=0.5)
    cluster.clock.now += 1
    too_late = await line.come("a", handicap=0.5)
    assert await line.take(9) == [short, later, long, too_late]


async def test_a_request_that_comes_back_pays_once_and_stands_in_its_place(cluster: Pool):
    line = await Line.of(cluster, FCFS)
    mine = await line.come("b", cost=3.0)
    for _ in range(9):
        await line.come("a", cost=1.0)
    assert mine in await line.take(2)
    assert await line.gateway.give_back(mine, line.claims[mine].claim, 4, fault=False)
    for _ in range(3):
        await line.come("b")
    assert (await line.take(1)) == [mine]
    assert line.claims[mine].generated == 4


async def test_the_level_of_a_request_goes_with_it_to_the_next_worker(cluster: Pool):
    line = await Line.of(cluster, SKIP_JOIN)
    mine = await line.come("a")
    await line.take(1, "d")
    worker = await cluster.worker("e", Role.DECODE)
    [first] = [line.claims[mine]]
    dead = cluster.queues["d"]
    assert await dead.report([Progress(mine, first.claim.fence, 7, 0.06)], IDLE)
    cluster.clock.now += 3
    await worker.report([], IDLE)
    cluster.clock.now += 3  # d is silent
    assert (await line.gateway.reap()).requeued == (mine,)
    await line.take(1, "e")
    again = line.claims[mine]
    assert (again.level, again.generated, again.claim.attempt) == (1, 7, 2)
    # 0.01 s of level 1 are spent already: 0.19 more, of 0.2, end it.
    [reply] = await worker.report([Progress(mine, again.claim.fence, 9, 0.195)], IDLE) or []
    assert reply.level == 2


async def test_a_predicted_request_sinks_when_it_outlives_the_prediction(cluster: Pool):
    line = await Line.of(cluster, QueueSettings(policy="predicted-srpt", levels=3))
    mine = await line.come("a", predicted_tokens=10)
    await line.take(1, "d")
    fence = line.claims[mine].claim.fence
    worker = cluster.queues["d"]

    async def level_at(generated: int) -> int:
        [reply] = await worker.report([Progress(mine, fence, generated, 99.0)], IDLE) or []
        return reply.level

    assert [await level_at(n) for n in (10, 11, 20, 21, 1000)] == [0, 1, 1, 2, 2]


async def test_a_request_whose_deadline_is_near_goes_before_its_class(cluster: Pool):
    settings = replace(FEW_LEVELS, urgent_before=2.0)
    line = await Line.of(cluster, settings)
    first = [await line.come("a"), await line.come("a")]
    late = await line.come("a", prompt=1000, cost=1.0, time_to_live=5.0)
    at_once = await line.come("a", cost=1.0, time_to_live=2.9)
    high = await line.come("a", priority=1)
    assert await line.gateway.promote() == 0
    assert await line.take(2) == [high, at_once]
    cluster.clock.now += 2.1
    await line.gateway.heartbeat()
    assert await line.gateway.promote() == 1
    assert await line.take(9) == [late, *first]


async def test_urgency_does_not_buy_a_tenant_more_than_its_turn(cluster: Pool):
    line = await Line.of(cluster, FCFS)
    for _ in range(20):
        await line.come("a", time_to_live=1.0)
    patient = await line.come("b")
    assert patient in await line.take(3)


async def test_other_gateways_requests_wait_in_order_while_one_restarts(cluster: Pool):
    line = await Line.of(cluster, FCFS)
    other = await cluster.gateway("other", FCFS)
    mine = [await line.come("a"), await line.come("b"), await line.come("a")]
    cluster.clock.now += 6
    await line.gateway.heartbeat()
    await other.submit(Submission("theirs", "c", 10, 100))
    cluster.clock.now += 6
    for worker in ("p", "d"):
        await cluster.queues[worker].register()
    await line.gateway.heartbeat()
    restarted = await cluster.gateway("restarted", FCFS)
    await restarted.reap()
    assert await line.take(9) == [mine[0], mine[1], mine[2]]


async def test_after_a_loss_of_data_requests_of_all_gateways_stand_as_before(
    cluster: Pool, redis_url: str
):
    one, two = await cluster.gateway("g1", FCFS), await cluster.gateway("g2", FCFS)
    submitted: dict[str, tuple[RedisGatewayQueue, Submission, float]] = {}
    for i in range(6):
        cluster.clock.now += 0.5
        gateway = (one, two)[i % 2]
        submission = Submission(f"r{i}", "t", 10, 100, cost=0.5)
        await gateway.submit(submission)
        submitted[submission.request_id] = (gateway, submission, cluster.clock.now)
    async with Redis.from_url(redis_url) as raw:
        names = [name async for name in raw.scan_iter(f"{keys.prefix(cluster.name)}*")]
        await raw.delete(*names)
        await raw.connection_pool.disconnect()
    for gateway in (two, one):  # the later ones are told first
        assert not await gateway.heartbeat()
        cluster.clock.now += 0.1
        live = [
            Live(submission, 0, 0, None, None, age=cluster.clock.now - at)
            for owner, submission, at in submitted.values()
            if owner is gateway
        ]
        assert await gateway.reconcile(live[::-1]) == len(live)
    await cluster.worker("p", capacity_tokens=10**6)
    target = await record(one, "p")
    served = [
        claimed.request_id for i in range(6) for claimed in await (one, two)[i % 2].claim(target, 1)
    ]
    assert served == [f"r{i}" for i in range(6)]


async def test_measured_costs_decide_the_level_from_the_next_heartbeat_on(cluster: Pool):
    line = await Line.of(cluster, SKIP_JOIN)
    assert await line.gateway.submit(Submission("before", "a", 1000, 9)) == 2
    line.gateway.measured(0.001, 0.00001)
    await line.gateway.heartbeat()
    assert await line.gateway.submit(Submission("after", "a", 1000, 9)) == 0


@pytest.mark.parametrize("policy", ["mlfq", "predicted-srpt"])
async def test_without_skip_join_everybody_joins_level_0(cluster: Pool, policy: str):
    line = await Line.of(cluster, QueueSettings(policy=policy))  # type: ignore[arg-type]
    assert await line.gateway.submit(Submission("r", "a", 100_000, 9)) == 0


async def test_a_tenant_is_forgotten_with_its_last_request(cluster: Pool, redis_url: str):
    line = await Line.of(cluster, FCFS)
    mine = await line.come("a")
    await line.come("b")
    await line.take(2)
    lane = keys.key(cluster.name, "lane", "0/a")
    async with Redis.from_url(redis_url) as raw:
        assert await raw.exists(lane)
        await line.gateway.finish(mine, Outcome.FINISHED, 9)
        assert not await raw.exists(lane)
        await raw.connection_pool.disconnect()


async def test_a_place_that_is_open_to_some_tenants_goes_to_the_first_of_theirs(cluster: Pool):
    gateway = await cluster.gateway("g", FCFS)
    await cluster.worker("p", capacity_tokens=100)
    for number, tenant in enumerate("aaabcb"):
        await gateway.submit(Submission(f"{tenant}{number}", tenant, 10, 100))
    target = await record(gateway, "p")
    assert await gateway.next_up(8, ["b", "c"]) == ["b3", "c4", "b5"]
    assert [c.request_id for c in await gateway.claim(target, 8, ["d"])] == []
    assert [c.request_id for c in await gateway.claim(target, 1, ["b", "c"])] == ["b3"]
    assert [c.request_id for c in await gateway.claim(target, 8, ["b"])] == ["b5"]
    rest = [c.request_id for c in await gateway.claim(target, 8)]
    assert sorted(rest) == ["a0", "a1", "a2", "c4"]
