"""Who is served next, over sockets: a worker that is full stands still, requests come, it goes on.

Order is read from what the worker was told to start; nothing is timed.
"""

from __future__ import annotations

import asyncio

import pytest

BATCH = 4
FCFS = {"policy": "fcfs", "decode_ahead": 0.25, "token_seconds": 0.1, "fairness_slack": 0.1}
MLFQ = {**FCFS, "policy": "skip-join-mlfq", "mlfq_promote_after": 1000.0}


class Rush:
    """Requests in flight, and what became of their order."""

    def __init__(self, cluster, worker) -> None:
        self.cluster, self.worker = cluster, worker
        self.calls: list[asyncio.Task] = []

    @property
    def sessions(self):
        return self.cluster.server.gateway.sessions

    async def come(self, tenant: str, count: int, prompt=(5,), eventually=None, **more) -> None:
        """So many requests of a tenant, one after the other."""
        for _ in range(count):
            before = len(self.sessions)
            number = len(self.calls)
            call = self.cluster.client.generate_unary(
                list(prompt), max_tokens=4, user=tenant, request_id=f"{tenant}-{number}", **more
            )
            self.calls.append(asyncio.create_task(call))
            await eventually(lambda before=before: len(self.sessions) > before)
            await self.sessions_are_queued()

    async def sessions_are_queued(self) -> None:
        """Wait until the queue has answered for all of them."""
        async with asyncio.timeout(5):
            while self.sessions.waiting + len(self.worker.started) < len(self.calls):
                await asyncio.sleep(0.002)

    def started(self) -> list[str]:
        """Tenants, in the order in which the worker was given their requests."""
        return [start.request.request_id.split("-")[0] for start in self.worker.started]

    async def end(self) -> list[str]:
        self.worker.paused = False
        await asyncio.gather(*self.calls)
        return self.started()


@pytest.fixture
async def rush(cluster, request):
    """A gateway and one decode worker, which stands still."""
    await cluster.start(**getattr(request, "param", FCFS))
    worker = await cluster.decode(batch_sequences=BATCH, paused=True, worker_ttl=5.0)
    await cluster.ready()
    return Rush(cluster, worker)


async def test_a_worker_holds_its_batch_and_little_more_the_rest_waits_in_the_queue(
    rush, eventually
):
    await rush.come("a", 12, eventually=eventually)
    await eventually(lambda: len(rush.started()) == BATCH + 1)
    assert rush.sessions.waiting == 12 - BATCH - 1
    await rush.end()
    ids = [start.request.request_id for start in rush.worker.started]
    assert ids == [f"a-{i}" for i in range(12)]


async def test_single_requests_keep_their_place_in_anothers_flood(rush, eventually):
    await rush.come("flood", 200, eventually=eventually)
    held = len(rush.started())
    await rush.come("b", 2, eventually=eventually)
    await rush.come("c", 1, eventually=eventually)
    order = (await rush.end())[held:]
    assert order.index("b") <= 2 and order.index("c") <= 2
    assert [i for i, tenant in enumerate(order) if tenant == "b"][1] <= 6
    assert len(order) == 203 - held


async def test_a_full_worker_is_sent_what_a_tenant_has_less_than_its_share_of(rush, eventually):
    await rush.come("flood", 20, eventually=eventually)
    await eventually(lambda: len(rush.started()) == BATCH + 1)
    await rush.come("b", 4, eventually=eventually)
    await eventually(lambda: rush.started().count("b") == 2)  # of 5 places, for two tenants
    await rush.come("c", 2, eventually=eventually)
    await eventually(lambda: rush.started().count("c") == 1)
    assert rush.started().count("flood") == BATCH + 1
    assert rush.sessions.waiting == 15 + 2 + 1
    keys = {s.request.tenant for s in rush.worker.started}
    assert len(keys) == 3 and not keys & {"flood", "b", "c", ""}
    assert len(await rush.end()) == 26


@pytest.mark.parametrize("rush", [MLFQ], indirect=True)
async def test_a_flood_of_short_prompts_does_not_starve_a_long_one_of_another_tenant(
    rush, eventually
):
    await rush.come("flood", 60, eventually=eventually)
    held = len(rush.started())
    await rush.come("b", 1, prompt=[5] * 150, eventually=eventually)
    order = (await rush.end())[held:]
    assert rush.worker.started[held + order.index("b")].request.level > 0
    assert order.index("b") <= 2


async def test_higher_priority_goes_before_all_of_lower(rush, eventually):
    await rush.come("a", 20, eventually=eventually)
    await rush.come("b", 3, eventually=eventually)
    await eventually(lambda: len(rush.started()) == BATCH + 1 + 2)  # what b is owed is sent, too
    held = len(rush.started())
    await rush.come("high", 4, priority=1, eventually=eventually)
    order = (await rush.end())[held:]
    assert order[:4] == ["high"] * 4


async def test_a_request_that_lost_its_worker_does_not_queue_again_at_the_end(
    rush, cluster, eventually
):
    await rush.come("a", 12, eventually=eventually)
    held = rush.started()
    await eventually(lambda: len(rush.started()) == BATCH + 1)
    other = await cluster.decode("decode-1", batch_sequences=BATCH, paused=True)
    cluster.workers.remove(rush.worker)
    await rush.worker.kill()
    assert set(held) == {"a"}
    await eventually(lambda: len(other.started) == BATCH + 1)
    again = sorted(int(start.request.request_id.split("-")[1]) for start in other.started)
    other.paused = False
    await asyncio.gather(*rush.calls)
    both = [int(start.request.request_id.split("-")[1]) for start in other.started]
    assert max(both.index(i) for i in range(BATCH + 1)) <= 2 * (BATCH + 1)
    assert again
