"""Where requests go whose prompts begin like earlier ones, with workers that follow a script."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from redis.asyncio import Redis

from queueing import keys
from queueing.contract import Submission
from tests.gateway.workers import FakeWorker

BLOCK = 4
OUTPUT = 8
NAMES = itertools.count()
# Outputs are expected to be as long as they may be.
OPTIONS = {"length_predictor": "off", "local_prefill_tokens": 0}
CACHES = {"prefix_block_size": BLOCK, "worker_ttl": 5.0}


class Talk:
    """A conversation: each turn's prompt is all that was said before, and three tokens more."""

    def __init__(self, name: str, **options) -> None:
        self.name, self.options = name, options
        self.tokens = [10 + len(name) + ord(name[0]) % 50] * 40

    async def turn(self, client, **options) -> str:
        """Returns the request's id."""
        request_id = f"{self.name}-{next(NAMES)}"
        options = {"max_tokens": OUTPUT, "token_ids": True, **self.options, **options}
        answer = await client.generate_unary(self.tokens, request_id=request_id, **options)
        self.tokens = [*self.tokens, *answer.message.outputs[0].token_ids, 7, 8, 9]
        return request_id


def served(worker: FakeWorker) -> list[str]:
    """Names of the conversations whose prompts it got, turn by turn."""
    ids = (
        [start.request.request_id for start in worker.started]
        if hasattr(worker, "started")
        else [one.request.request_id for one in worker.requests]
    )
    return [id.split("-")[0] for id in ids]


async def begin_apart(cluster, talks, workers, eventually) -> None:
    """Have the first turn of each on a worker of its own: each is busy while the next comes."""
    for worker in workers:
        worker.paused = True
    turns = []
    for count, talk in enumerate(talks, 1):
        turns.append(asyncio.create_task(talk.turn(cluster.client)))
        await eventually(lambda count=count: sum(len(w.started) for w in workers) == count)
    for worker in workers:
        worker.paused = False
    await asyncio.gather(*turns)
    assert [len(worker.started) for worker in workers] == [1] * len(workers)


@pytest.fixture
async def two(cluster, request):
    """A gateway, and two decode workers with caches."""
    cluster.d = [await cluster.decode(f"decode-{i}", **CACHES) for i in range(2)]
    await cluster.start(**{**OPTIONS, **getattr(request, "param", {})})
    await cluster.ready()
    return cluster


async def cached(cluster, request_id: str) -> int:
    """What the queue was told of a request."""
    redis = Redis.from_url(cluster.redis_url)
    try:
        return int(await redis.hget(keys.key(cluster.pool, "request", request_id), "cached"))
    finally:
        await redis.aclose()


async def test_each_conversation_goes_on_where_it_began(two, eventually):
    a, b = Talk("a"), Talk("b")
    await begin_apart(two, [a, b], two.d, eventually)
    for talk in (b, a, a, b, b):
        await talk.turn(two.client)
    assert [served(worker) for worker in two.d] == [["a"] * 3, ["b"] * 4]


@pytest.mark.parametrize("two", [{"routing": "kv-aware"}], indirect=True)
async def test_other_routers_do_not_look_at_prompts(two, eventually):
    a, b = Talk("a"), Talk("b")
    await begin_apart(two, [a, b], two.d, eventually)
    request_id = await b.turn(two.client)
    assert served(two.d[0]) == ["a", "b"]
    assert await cached(two, request_id) == 0


async def test_a_swamped_worker_loses_its_conversations(two, eventually):
    a, b = Talk("a"), Talk("b")
    await begin_apart(two, [a, b], two.d, eventually)
    two.d[0].paused = True
    busy = asyncio.create_task(Talk("x").turn(two.client, max_tokens=50))
    await eventually(lambda: served(two.d[0]) == ["a", "x"])
    await a.turn(two.client)  # 44 tokens of it are there, and 50 are to be generated
    assert served(two.d[1]) == ["b", "a"]
    two.d[0].paused = False
    await busy


async def test_a_worker_with_less_to_do_than_a_hit_saves_keeps_its_conversations(two, eventually):
    a, b = Talk("a"), Talk("b")
    await begin_apart(two, [a, b], two.d, eventually)
    two.d[0].paused = True
    busy = asyncio.create_task(Talk("x").turn(two.client, max_tokens=40))
    await eventually(lambda: served(two.d[0]) == ["a", "x"])
    going_on = asyncio.create_task(a.turn(two.client))
    await eventually(lambda: served(two.d[0]) == ["a", "x", "a"])
    two.d[0].paused = False
    await asyncio.gather(busy, going_on)


async def test_the_queue_is_told_of_tokens_that_are_cached_for_this_tenant_and_salt(two):
    a = Talk("a")
    first = await a.turn(two.client)
    assert await cached(two, first) == 0
    same = a.tokens
    assert await cached(two, await a.turn(two.client)) == 44  # of 51; the output's last has no KV
    for options in (
        {"user": "another"},
        {"cache": {"salt": "s"}},
        {"cache": {"bypass_prefix_cache": True}},
        {"prompt_logprobs": 0},
    ):
        a.tokens = same
        assert await cached(two, await a.turn(two.client, **options)) == 0


async def test_a_request_that_bypasses_caches_leaves_nothing_to_others(two):
    a = Talk("a")
    same = a.tokens
    await a.turn(two.client, cache={"bypass_prefix_cache": True})
    a.tokens = same
    assert await cached(two, await a.turn(two.client)) == 0
    a.tokens = same
    assert await cached(two, await a.turn(two.client)) == 36


async def test_what_a_worker_had_is_forgotten_when_it_starts_anew(two, eventually):
    a, b = Talk("a"), Talk("b")
    await begin_apart(two, [a, b], two.d, eventually)
    epochs = [worker.epoch for worker in two.server.gateway.fleet.records]
    await two.d[1].queue.register()  # as a process of the same name would
    fleet = two.server.gateway.fleet
    await eventually(lambda: [worker.epoch for worker in fleet.records] != epochs)
    assert await cached(two, await b.turn(two.client)) == 0
    assert await cached(two, await a.turn(two.client)) == 44


async def test_gateways_share_what_they_know(two, eventually):
    other, client = await two.one_more(**OPTIONS)
    await two.ready()
    a, b = Talk("a"), Talk("b")
    await begin_apart(two, [a, b], two.d, eventually)
    await eventually(lambda: len(other.gateway.prefixes) == 2 * 11)
    for talk in (b, a):
        assert await cached(two, await talk.turn(client)) == 44
    assert [served(worker) for worker in two.d] == [["a"] * 2, ["b"] * 2]
    await eventually(lambda: len(two.server.gateway.prefixes) == 2 * 14)
    for talk in (b, a):
        assert await cached(two, await talk.turn(two.client)) == 56
    assert [served(worker) for worker in two.d] == [["a"] * 3, ["b"] * 3]
    late, client = await two.one_more(**OPTIONS)  # hears what was told before it came
    await two.ready()
    await eventually(lambda: len(late.gateway.prefixes) == 2 * 17)
    assert await cached(two, await b.turn(client)) == 68


@pytest.fixture
async def full(cluster, request, eventually):
    """Two conversations apart; the worker of the first stands still and has no place left."""
    small = CACHES | {"batch_sequences": 1}  # and one may wait
    cluster.d = [await cluster.decode(f"decode-{i}", **small) for i in range(2)]
    await cluster.start(**OPTIONS, decode_ahead=0, prefill_seconds_per_token=request.param)
    await cluster.ready()
    cluster.talks = [Talk("a"), Talk("b")]
    await begin_apart(cluster, cluster.talks, cluster.d, eventually)
    cluster.d[0].paused = True
    cluster.busy = []
    for count in (2, 3):
        copy = Talk("a")
        copy.tokens = cluster.talks[0].tokens
        cluster.busy.append(asyncio.create_task(copy.turn(cluster.client)))
        await eventually(lambda count=count: served(cluster.d[0]) == ["a"] * count)
    assert not cluster.server.gateway.fleet.decode["decode-0"].openings
    return cluster


@pytest.mark.parametrize("full", [100.0], indirect=True)
async def test_a_request_waits_for_the_worker_that_has_its_prompt_and_others_pass(full, eventually):
    held = asyncio.create_task(full.talks[0].turn(full.client))
    await eventually(lambda: full.server.gateway.sessions.waiting == 1)
    await Talk("y").turn(full.client)
    assert served(full.d[1]) == ["b", "y"]
    full.d[0].paused = False
    await asyncio.gather(held, *full.busy)
    assert served(full.d[0]) == ["a"] * 4


@pytest.mark.parametrize("full", [100.0], indirect=True)
async def test_a_request_that_nobody_has_any_more_does_not_stay_in_the_queue(full, eventually):
    await full.server.gateway.queue.submit(Submission("ghost", "default", 10, 10))
    held = asyncio.create_task(full.talks[0].turn(full.client))
    await eventually(lambda: full.server.gateway.sessions.waiting == 1)
    await Talk("y").turn(full.client)  # now two wait, and the queue is asked who is next
    full.d[0].paused = False
    await asyncio.gather(held, *full.busy)
    redis = Redis.from_url(full.redis_url, decode_responses=True)
    try:
        async with asyncio.timeout(5):
            while await redis.hget(keys.key(full.pool, "request", "ghost"), "state") != "C":
                await asyncio.sleep(0.01)
    finally:
        await redis.aclose()


@pytest.mark.parametrize("full", [1e-4], indirect=True)
async def test_a_request_does_not_wait_longer_than_its_prompt_would_take(full):
    await full.talks[0].turn(full.client)
    assert served(full.d[1]) == ["b", "a"]
    full.d[0].paused = False
    await asyncio.gather(*full.busy)


async def test_a_tenants_share_of_full_workers_is_where_its_prompt_is(cluster, eventually):
    small = CACHES | {"batch_sequences": 1}  # and one may wait
    cluster.d = [await cluster.decode(f"decode-{i}", **small) for i in range(2)]
    await cluster.start(**OPTIONS, decode_ahead=0, prefill_seconds_per_token=100.0)
    await cluster.ready()
    a, b = Talk("a"), Talk("b", user="another")
    await begin_apart(cluster, [a, b], cluster.d, eventually)
    for worker in cluster.d:
        worker.paused = True
    busy = []
    for count, name in enumerate("wxyz", 3):
        busy.append(asyncio.create_task(Talk(name).turn(cluster.client)))
        await eventually(lambda count=count: sum(len(w.started) for w in cluster.d) == count)
    assert not any(link.openings for link in cluster.server.gateway.fleet.decode.values())
    going_on = asyncio.create_task(b.turn(cluster.client))
    await eventually(lambda: sum(len(worker.started) for worker in cluster.d) == 7)
    assert served(cluster.d[1])[-1] == "b"
    for worker in cluster.d:
        worker.paused = False
    await asyncio.gather(going_on, *busy)


@pytest.fixture
async def four(cluster, request, eventually):
    """A gateway, two prefill and two decode workers, all with caches; a conversation on the first
    of each kind, and one on the second."""
    one = CACHES | {"batch_sequences": 1}
    cluster.d = [await cluster.decode(f"decode-{i}", **one) for i in range(2)]
    cluster.p = [await cluster.prefill(f"prefill-{i}", **CACHES, delay=0.2) for i in range(2)]
    await cluster.start(**{**OPTIONS, **getattr(request, "param", {})})
    await cluster.ready()
    cluster.talks = [Talk("a"), Talk("b")]
    await begin_apart(cluster, cluster.talks, cluster.d, eventually)
    assert [served(worker) for worker in cluster.p] == [["a"], ["b"]]
    for worker in cluster.p:
        worker.delay = 0.0
    return cluster


async def test_prompts_go_to_the_prefill_worker_that_has_their_beginning(four):
    a, b = four.talks
    for talk in (b, a, b):
        await talk.turn(four.client)
    assert [served(worker) for worker in four.p] == [["a"] * 2, ["b"] * 3]


@pytest.mark.parametrize("four", [{"local_prefill_tokens": 7}], indirect=True)
async def test_a_decode_worker_that_has_nearly_all_of_a_prompt_computes_the_rest(four):
    a, b = four.talks
    await b.turn(four.client)  # 44 of 51 are there
    a.tokens += [6] * 4
    await a.turn(four.client)
    assert [start.local_prefill for start in four.d[1].started] == [False, True]
    assert [start.local_prefill for start in four.d[0].started] == [False, False]
    assert [served(worker) for worker in four.p] == [["a"] * 2, ["b"]]


@pytest.mark.parametrize("four", [{"local_prefill_tokens": 7}], indirect=True)
async def test_a_decode_worker_whose_batch_is_full_leaves_prompts_to_prefill_workers(
    four, eventually
):
    _, b = four.talks
    for worker in four.d:
        worker.paused = True
    busy = []
    for name, worker in zip("xy", four.d, strict=True):
        busy.append(asyncio.create_task(Talk(name).turn(four.client)))
        await eventually(lambda name=name, worker=worker: served(worker)[-1] == name)
    going_on = asyncio.create_task(b.turn(four.client))
    await eventually(lambda: served(four.p[1])[-1] == "b")
    assert not any(start.local_prefill for worker in four.d for start in worker.started)
    for worker in four.d:
        worker.paused = False
    await asyncio.gather(going_on, *busy)
