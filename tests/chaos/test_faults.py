"""Processes die, freeze, leave and come back while they serve: clients see the same tokens."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import Unavailable
from tests.chaos.conftest import LONG_PROMPT, Load, Parts, eventually, tokens

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

Tokens = list[tuple[int, ...]]
LEASE_SECONDS = 30.0  # --kv-lease-seconds: what is freed sooner was freed on purpose


async def test_killed_workers_cost_no_token(parts: Parts, expected: Tokens) -> None:
    async with parts.client() as client:
        load = Load(client, times=2)
        await load.begun()
        parts["decode-0"].kill()
        more = asyncio.create_task(tokens(client, LONG_PROMPT, 20))
        parts["prefill-0"].kill()  # now or soon in the long prompt's prefill
        assert await load.end() == expected * 2
        assert await more == expected[2][:20]

        load = Load(client)
        await load.flowing()
        parts["decode-1"].kill()  # nobody is left
        parts["decode-0"].start()
        assert await load.end() == expected
    await parts.quiet()


async def test_frozen_workers_are_passed_by_and_say_nothing_when_they_thaw(
    parts: Parts, expected: Tokens
) -> None:
    async with parts.client() as client:
        for name in ("decode-1", "prefill-0"):
            load = Load(client, times=2)
            if name == "decode-1":
                await load.flowing()
            parts[name].freeze()
            try:
                assert await load.end() == expected * 2
                await parts.forgotten(name)
            finally:
                parts[name].thaw()
            await parts.whole()
            load = Load(client)
            assert await load.end() == expected
    await parts.quiet()


async def test_a_killed_gateway_leaves_nothing_and_the_other_one_goes_on(
    parts: Parts, expected: Tokens
) -> None:
    async with parts.client("gateway-0") as doomed, parts.client("gateway-1") as client:
        lost, load = Load(doomed), Load(client)
        await lost.flowing()  # what was in prefill would count against its worker for 10 s more
        parts["gateway-0"].kill()
        outcomes = await lost.end()
        assert any(isinstance(outcome, Unavailable) for outcome in outcomes)
        for outcome, whole in zip(outcomes, expected, strict=True):
            assert isinstance(outcome, Unavailable) or outcome == whole
        assert await load.end() == expected
        await parts.quiet(LEASE_SECONDS / 2)
        await parts.whole()
        assert await Load(doomed).end() == expected


async def test_streams_outlive_redis_and_new_requests_are_told_to_come_back(
    parts: Parts, expected: Tokens
) -> None:
    redis = parts["redis"]
    async with parts.client() as client:
        for stop, go_on in ((redis.freeze, redis.thaw), (redis.kill, redis.start)):
            load = Load(client)
            await load.flowing()
            stop()
            try:
                with pytest.raises(Unavailable) as refused:
                    await tokens(client, "Hello", 3)
                assert refused.value.retry_after > 0
            finally:
                go_on()
            assert await load.end() == expected
            await parts.whole()
            assert await Load(client).end() == expected
    await parts.quiet()


async def test_what_cancelled_requests_held_is_free_at_once(parts: Parts) -> None:
    async with parts.client() as client:
        for round_ in range(60):
            calls = [asyncio.create_task(tokens(client, "Hello there", 50)) for _ in range(3)]
            await asyncio.sleep(0.001 * round_)  # anywhere between submission and decoding
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        await parts.quiet(LEASE_SECONDS / 2)
        assert len(await tokens(client, "Hello there", 5)) == 5


async def test_processes_told_to_leave_finish_what_they_have(
    parts: Parts, expected: Tokens
) -> None:
    async with parts.client() as client:
        for name in ("decode-0", "prefill-0", "gateway-0"):
            load = Load(client)
            await load.flowing()
            leaving = asyncio.create_task(parts[name].terminate())
            assert await load.end() == expected
            assert await leaving == 0
            assert "Traceback" not in parts[name].log()
    await eventually(lambda: not parts["gateway-0"].running)
    await parts.quiet()
