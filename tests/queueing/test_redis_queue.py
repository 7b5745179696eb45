"""Each operation by example, on a real server and its own clock unless a test sets one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from baton.errors import AlreadyExists, ConfigError, Overloaded, QueueError
from baton.types import Claim, Load
from queueing import keys
from queueing.contract import (
    Live,
    Outcome,
    Progress,
    Registration,
    Role,
    Submission,
    Verdict,
    WorkerRecord,
)
from queueing.embedded import EmbeddedRedis
from queueing.redis_queue import RedisGatewayQueue, RedisWorkerQueue
from queueing.settings import QueueSettings

IDLE = Load(running=0, waiting=0, free_blocks=8, total_blocks=8)


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Pool:
    """Gateways and workers of one pool, closed together."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name, self.clock = url, name, Clock()
        self.queues: dict[str, RedisWorkerQueue] = {}
        self._open: list[RedisGatewayQueue | RedisWorkerQueue] = []

    async def gateway(self, id: str, settings: QueueSettings | None = None) -> RedisGatewayQueue:
        queue = RedisGatewayQueue(self.url, self.name, id, settings, clock=self.clock)
        self._open.append(queue)
        await queue.heartbeat()
        return queue

    async def worker(
        self, id: str, role: Role = Role.PREFILL, capacity_tokens: int = 1000
    ) -> RedisWorkerQueue:
        registration = Registration(
            id=id,
            role=role,
            address=f"{id}:1",
            layout_digest="layout",
            model="fingerprint",
            capacity_tokens=capacity_tokens,
            capacity_blocks=8,
            max_context=4096,
            dtype="bfloat16",
        )
        queue = RedisWorkerQueue(self.url, self.name, registration, clock=self.clock)
        self._open.append(queue)
        self.queues[id] = queue
        await queue.register()
        return queue

    async def close(self) -> None:
        for queue in self._open:
            await queue.close()


@pytest.fixture
async def cluster(redis_url: str, pool: str) -> AsyncIterator[Pool]:
    cluster = Pool(redis_url, pool)
    yield cluster
    await cluster.close()


def request(id: str, prompt_tokens: int = 10, **more: int | float) -> Submission:
    return Submission(id, "tenant", prompt_tokens, 100, **more)  # type: ignore[arg-type]


async def record(queue: RedisGatewayQueue, id: str) -> WorkerRecord:
    return next(worker for worker in await queue.workers() if worker.id == id)


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
    assert (await record(gateway, "p")).dtype == "bfloat16"


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
