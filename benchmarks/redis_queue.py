"""Cost of the queue's operations on an embedded server.

    python benchmarks/redis_queue.py [QUEUED ...]

For each number of waiting requests: microseconds of server CPU per call (INFO cpu, so other load
on the machine does not count) and the median latency that one client sees.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from redis.asyncio import Redis

from baton.types import Load
from queueing import keys
from queueing.contract import (
    Claimed,
    Outcome,
    Progress,
    Registration,
    Role,
    Submission,
    WorkerRecord,
)
from queueing.embedded import EmbeddedRedis, find_servers
from queueing.prefixes import PrefixExchange
from queueing.redis_queue import LOOK_AHEAD, RedisGatewayQueue, RedisWorkerQueue
from queueing.settings import QueueSettings

CALLS = 300
KEYS = 128  # of blocks, told in one call
TENANTS = 50
MANY = QueueSettings(
    max_queued_requests=10**6,
    max_queued_tokens=10**9,
    max_requests_per_tenant=10**6,
    gateway_ttl=600.0,  # nobody gives signs of life here
)


async def measure(name: str, raw: Redis, calls: list[Callable[[], Awaitable[Any]]]) -> list[Any]:
    """Run the calls one by one, print their cost, return their results."""

    async def cpu() -> float:
        info = await raw.info("cpu")
        return float(info["used_cpu_user_main_thread"] + info["used_cpu_sys_main_thread"])

    results, latencies, before = [], [], await cpu()
    for call in calls:
        began = time.perf_counter()
        results.append(await call())
        latencies.append(time.perf_counter() - began)
    used = (await cpu() - before) / len(calls)
    print(f"  {name:<14} {used * 1e6:7.0f} us CPU  {statistics.median(latencies) * 1e3:7.2f} ms")
    return results


async def run(url: str, queued: int) -> None:
    """One table."""
    pool = f"bench-{queued}"
    gateway = RedisGatewayQueue(url, pool, "g", MANY)
    registration = Registration("d", Role.DECODE, "d:1", "l", "m", 10**9, 1000, 4096)
    worker = RedisWorkerQueue(url, pool, registration, worker_ttl=600.0)
    raw = Redis.from_url(url)
    await gateway.heartbeat()
    await worker.register()
    [target] = await gateway.workers()

    def submit(i: int) -> Awaitable[int]:
        return gateway.submit(Submission(f"r{i:07}", f"t{i % TENANTS}", 10 + i % 2000, 256))

    for start in range(0, queued, 16):
        await asyncio.gather(*(submit(i) for i in range(start, start + 16)))
    print(f"{queued} waiting")
    ids = range(queued + 16, queued + 16 + CALLS)
    await measure("submit", raw, [lambda i=i: submit(i) for i in ids])
    await measure("next_up(16)", raw, [lambda: gateway.next_up(16)] * CALLS)
    names = await gateway.next_up(LOOK_AHEAD)
    await measure(
        "claim by name", raw, [lambda id=id: gateway.claim(target, 1, only=id) for id in names]
    )
    batches = await measure("claim(8)", raw, [lambda: gateway.claim(target, 8)] * CALLS)
    claimed: list[Claimed] = [one for batch in batches for one in batch]
    await exchange_prefixes(PrefixExchange(url, pool), pool, target, raw)
    load = Load(64, 0, 10, 1000)

    def report(step: int) -> Awaitable[Any]:
        lines = [Progress(c.request_id, c.claim.fence, step, step * 0.01) for c in claimed[:64]]
        return worker.report(lines, load)

    await measure("report(64)", raw, [lambda i=i: report(i) for i in range(CALLS)])
    await measure(
        "finish",
        raw,
        [
            lambda c=c: gateway.finish(c.request_id, Outcome.FINISHED, 9, c.claim)
            for c in claimed[:CALLS]
        ],
    )
    await measure("reap (nothing)", raw, [gateway.reap] * CALLS)
    await worker.deregister()
    for queue in (gateway, worker):
        await queue.close()
    await raw.aclose()


async def exchange_prefixes(
    exchange: PrefixExchange, pool: str, target: WorkerRecord, raw: Redis
) -> None:
    """New keys in every call, and what they take."""
    told = [
        {(target.id, target.epoch): [secrets.token_bytes(16) for _ in range(KEYS)]}
        for _ in range(CALLS)
    ]
    await measure(
        f"prefixes({KEYS})", raw, [lambda news=news: exchange.exchange(news) for news in told]
    )
    held = await raw.memory_usage(keys.key(pool, "prefixes", target.id), samples=0)
    print(f"  prefix map     {held / len(told) / KEYS:7.0f} bytes per key")
    await exchange.close()


async def main(sizes: list[int]) -> None:
    """All servers found, all sizes."""
    for binary in find_servers():
        print(binary.name)
        for queued in sizes:
            async with await EmbeddedRedis.start(binary) as server:
                await run(server.url, queued)


if __name__ == "__main__":
    asyncio.run(main([int(size) for size in sys.argv[1:]] or [1_000, 10_000]))
