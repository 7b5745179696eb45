"""Each operation by example, on a real server and its own clock unless a test sets one."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from baton.errors import AlreadyExists, ConfigError, Overloaded
from baton.types import Load
from queueing import keys
from queueing.contract import Outcome, Progress, Role, Submission, Verdict
from queueing.redis_queue import RedisGatewayQueue
from queueing.settings import QueueSettings
from tests.queueing.pool import IDLE, Pool, record, request


async def test_a_gateway_ends_its_own_requests_only(cluster: Pool):
    owner, other = await cluster.gateway("a"), await cluster.gateway("b")
    await owner.submit(request("r"))
    assert not await other.finish("r", Outcome.CANCELLED, 0)
    assert await owner.finish("r", Outcome.CANCELLED, 0)


async def test_a_request_goes_from_the_queue_through_prefill_and_decode_to_its_end(cluster: Pool):
    gateway = await cluster.gateway("g")
    await cluster.worker("p")
    decode = await cluster.worker("d", Role.DECODE)
    assert await gateway.submit(request("r")) == 0

    [claimed] = await gateway.claim(await record(gateway, "p"), 8)
    assert (claimed.request_id, claimed.level, claimed.generated) == ("r", 0, 0)
    handed = await gateway.handoff("r", claimed.claim, await record(gateway, "d"))
    assert handed is not None and handed.fence > claimed.claim.fence
    [reply] = await decode.report([Progress("r", handed.fence, 5, 0.01)], IDLE) or []
    assert reply.verdict is Verdict.CONTINUE

    assert not await gateway.finish("r", Outcome.FINISHED, 5, claimed.claim)
    assert await gateway.finish("r", Outcome.FINISHED, 5, handed)
    assert not await gateway.finish("r", Outcome.CANCELLED, 5)
    assert await decode.report([Progress("r", handed.fence, 6, 0.02)], IDLE) == [
        type(reply)(Verdict.CANCELLED, 0)
    ]


async def test_a_claim_for_a_decode_worker_needs_no_handoff(cluster: Pool):
    gateway = await cluster.gateway("g")
    decode = await cluster.worker("d", Role.DECODE)
    await gateway.submit(request("r"))
    target = await record(gateway, "d")
    [claimed] = await gateway.claim(target, 1)
    assert await gateway.handoff("r", claimed.claim, target) is None
    [reply] = await decode.report([Progress("r", claimed.claim.fence, 1, 0.0)], IDLE) or []
    assert reply.verdict is Verdict.CONTINUE


@pytest.mark.parametrize(
    ("prompt", "cached", "level"),
    [(1, 0, 0), (90, 0, 0), (91, 0, 1), (190, 100, 0), (390, 0, 1), (391, 0, 2), (100_000, 0, 4)],
)
async def test_a_request_joins_the_level_that_covers_its_first_iteration(
    cluster: Pool, prompt: int, cached: int, level: int
):
    gateway = await cluster.gateway("g")  # 5 ms + 0.5 ms per token; quanta 50, 200, 800 ...
    assert await gateway.submit(request("r", prompt, cached_tokens=cached)) == level


async def test_service_demotes_level_by_level_and_carries_the_rest(cluster: Pool):
    gateway = await cluster.gateway("g")
    decode = await cluster.worker("d", Role.DECODE)
    await gateway.submit(request("r"))
    [claimed] = await gateway.claim(await record(gateway, "d"), 1)

    async def level_after(served: float) -> int:
        [reply] = await decode.report([Progress("r", claimed.claim.fence, 1, served)], IDLE) or []
        return reply.level

    assert await level_after(0.049) == 0
    assert await level_after(0.051) == 1
    assert await level_after(0.249) == 1  # 0.05 + 0.2 = 0.25 are the first two quanta
    assert await level_after(1.1) == 3
    assert await level_after(1.1) == 3


async def test_waiting_too_long_lifts_to_level_0_ahead_of_the_younger(cluster: Pool):
    gateway = await cluster.gateway("g")
    await cluster.worker("p", capacity_tokens=10_000)
    await gateway.submit(request("old", 500))
    cluster.clock.now += 6
    await gateway.submit(request("young", 10))
    assert await gateway.promote() == 1
    await gateway.heartbeat()
    alive = await cluster.worker("q", capacity_tokens=10_000)
    assert alive is not None
    claimed = await gateway.claim(await record(gateway, "q"), 8)
    assert [(c.request_id, c.level) for c in claimed] == [("old", 0), ("young", 0)]


async def test_priority_goes_before_level_and_level_before_age(cluster: Pool):
    gateway = await cluster.gateway("g")
    await cluster.worker("p", capacity_tokens=10_000)
    for id, prompt, priority in [
        ("low", 1, -3),
        ("long", 500, 0),
        ("first", 1, 0),
        ("second", 1, 0),
        ("urgent-long", 2000, 2**31 - 1),
    ]:
        await gateway.submit(request(id, prompt, priority=priority))
        cluster.clock.now += 0.001
    claimed = await gateway.claim(await record(gateway, "p"), 8)
    assert [c.request_id for c in claimed] == ["urgent-long", "first", "second", "long", "low"]


async def test_nobody_overtakes_the_request_of_another_gateway(cluster: Pool):
    one, two = await cluster.gateway("g1"), await cluster.gateway("g2")
    await cluster.worker("p", capacity_tokens=100)
    await one.submit(request("ahead", 60))
    cluster.clock.now += 0.001
    await two.submit(request("behind", 60))
    target = await record(one, "p")
    assert await two.claim(target, 8) == []  # 60 of the 100 tokens are spoken for
    assert [c.request_id for c in await one.claim(target, 8)] == ["ahead"]
    assert await two.claim(target, 8) == []


async def test_a_request_may_be_claimed_by_name_but_not_before_those_of_others(cluster: Pool):
    one, two = await cluster.gateway("g1"), await cluster.gateway("g2")
    await cluster.worker("p", capacity_tokens=120)
    for gateway, name, tokens in ((one, "a", 40), (two, "b", 40), (one, "c", 40), (one, "d", 41)):
        cluster.clock.now += 0.01
        await gateway.submit(request(name, tokens))
    assert await one.next_up(2) == ["a", "c"]
    target = await record(one, "p")
    [claimed] = await one.claim(target, 8, only="c")  # b fits beside it, and a need not
    assert claimed.request_id == "c"
    assert await one.claim(target, 8, only="d") == []  # what is left is for b
    assert [c.request_id for c in await two.claim(target, 8)] == ["b"]
    assert await one.next_up(8) == ["a", "d"]


async def test_a_prompt_larger_than_the_worker_waits_until_it_is_idle(cluster: Pool):
    gateway = await cluster.gateway("g")
    prefill = await cluster.worker("p", capacity_tokens=100)
    await gateway.submit(request("small", 50))
    target = await record(gateway, "p")
    [small] = await gateway.claim(target, 8)
    await gateway.submit(request("large", 5000))
    assert await gateway.claim(target, 8) == []
    await prefill.report([Progress("small", small.claim.fence, 1, 0.01)], IDLE)  # prompt through
    assert [c.request_id for c in await gateway.claim(target, 8)] == ["large"]


async def test_a_request_given_back_keeps_its_place_and_its_progress(cluster: Pool):
    gateway = await cluster.gateway("g")
    await cluster.worker("p")
    await gateway.submit(request("first"))
    cluster.clock.now += 0.001
    await gateway.submit(request("second"))
    target = await record(gateway, "p")
    [first] = await gateway.claim(target, 1)
    assert await gateway.give_back("first", first.claim, 3, fault=False)
    again, second = await gateway.claim(target, 8)
    assert (again.request_id, again.generated, again.claim.attempt) == ("first", 3, 1)
    assert second.request_id == "second"


async def test_a_deadline_is_named_until_its_owner_ends_the_request(cluster: Pool):
    gateway, other = await cluster.gateway("g"), await cluster.gateway("other")
    await cluster.worker("p")
    await gateway.submit(request("r", time_to_live=2.0))
    assert (await gateway.reap()).timed_out == ()
    cluster.clock.now += 2.1
    assert await gateway.claim(await record(gateway, "p"), 1) == []
    assert (await other.reap()).timed_out == ()
    assert (await gateway.reap()).timed_out == ("r",)
    assert (await gateway.reap()).timed_out == ("r",)
    assert await gateway.finish("r", Outcome.TIMED_OUT, 0)
    assert (await gateway.reap()).timed_out == ()


async def test_the_caps_refuse_with_their_subject_and_a_request_id_is_taken_once(cluster: Pool):
    caps = QueueSettings(max_queued_requests=3, max_queued_tokens=100, max_requests_per_tenant=2)
    gateway = await cluster.gateway("g", caps)
    await gateway.submit(request("a"))
    with pytest.raises(AlreadyExists):
        await gateway.submit(request("a"))
    with pytest.raises(Overloaded) as caught:
        await gateway.submit(request("b", 91))
    assert caught.value.subject == "queue tokens"
    await gateway.submit(request("b"))
    with pytest.raises(Overloaded) as caught:
        await gateway.submit(request("c"))
    assert caught.value.subject == "tenant requests"
    await gateway.submit(Submission("c", "another", 1, 1))
    with pytest.raises(Overloaded) as caught:
        await gateway.submit(Submission("d", "another", 1, 1))
    assert caught.value.subject == "queue" and caught.value.retry_after > 0


async def test_depth_counts_levels_and_tells_the_age_of_the_oldest(cluster: Pool):
    gateway = await cluster.gateway("g")
    await gateway.submit(request("a", 20, priority=1))
    cluster.clock.now += 2
    await gateway.submit(request("b", 30))
    await gateway.submit(request("c", 100))
    cluster.clock.now += 1
    zero, one, *rest = await gateway.depth()
    assert (zero.level, zero.requests, zero.tokens, zero.oldest) == (0, 2, 50, pytest.approx(3))
    assert (one.level, one.requests, one.tokens, one.oldest) == (1, 1, 100, pytest.approx(1))
    assert [level.requests for level in rest] == [0, 0, 0]


async def test_the_last_reported_load_is_in_the_worker_record(cluster: Pool):
    gateway = await cluster.gateway("g")
    worker = await cluster.worker("p")
    assert (await record(gateway, "p")).load is None
    await worker.report([], Load(1, 2, 3, 4, draining=True, steps_per_second=5.5))
    assert (await record(gateway, "p")).load == Load(1, 2, 3, 4, True, 5.5)
    known = await record(gateway, "p")
    assert (known.weight_dtype, known.kv_dtype) == ("int8", "bfloat16")


async def test_ended_requests_are_forgotten_soon(cluster: Pool, redis_url: str):
    gateway = await cluster.gateway("g")
    await gateway.submit(request("r"))
    await gateway.finish("r", Outcome.CANCELLED, 0)
    async with Redis.from_url(redis_url) as raw:
        assert 0 < await raw.ttl(keys.key(cluster.name, "request", "r")) <= 30
        await raw.connection_pool.disconnect()


async def test_decode_reports_under_the_old_claim_pass_until_activation(cluster: Pool):
    gateway = await cluster.gateway("g")
    await cluster.worker("p")
    decode = await cluster.worker("d", Role.DECODE)
    await gateway.submit(request("r"))
    [claimed] = await gateway.claim(await record(gateway, "p"), 1)
    reserved = Progress("r", claimed.claim.fence, 0, 0.0)
    [before] = await decode.report([reserved], IDLE) or []
    assert await gateway.handoff("r", claimed.claim, await record(gateway, "d"))
    [after] = await decode.report([reserved], IDLE) or []
    assert before.verdict is after.verdict is Verdict.CONTINUE


@pytest.mark.parametrize("name", ["", "a{b", "a}"])
def test_a_pool_name_that_breaks_the_hash_tag_is_refused(name: str):
    with pytest.raises(ConfigError, match="pool"):
        RedisGatewayQueue("redis://localhost", name, "g")


@pytest.mark.parametrize("url", ["", "http://h", "localhost:6379", "redis://h:port"])
def test_a_url_that_is_not_redis_is_refused(url: str):
    with pytest.raises(ConfigError, match="--redis-url"):
        RedisGatewayQueue(url, "p", "g")
