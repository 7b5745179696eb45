"""One tenant floods a cluster whose workers are full; another's request does not wait for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.client import Client, Text
from scheduling.simulator.replay import replay
from tests.e2e.conftest import Named, Run, Stack

FLOOD = 12
LONG = 110


async def _watch(client: Client, tenant: str, tokens: int, done: list[str]) -> list[int]:
    """The tokens of a request; its tenant is noted when it ends."""
    got: list[int] = []
    stream = client.generate(
        [5] * 8, max_tokens=tokens, ignore_eos=True, token_ids=True, user=tenant
    )
    async for event in stream:
        if isinstance(event, Text):
            got += event.message.token_ids
    done.append(tenant)
    return got


async def _until_full(stack: Stack) -> None:
    async with asyncio.timeout(10):
        while (
            stack.decode[0].worker.load().running < 2 or not stack.gateway.gateway.sessions.waiting
        ):
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("prefill", [0, 1])
async def test_a_single_request_ends_before_any_of_anothers_flood(
    prefill: int, run_stack: Run, named: Named, tmp_path: Path
) -> None:
    model, _ = named("llama")
    file, done = tmp_path / "run.jsonl", list[str]()
    async with run_stack(
        model.path,
        prefill=prefill,
        dtype="float32",
        policy="skip-join-mlfq",
        gateway_settings={"policy": "skip-join-mlfq"},
        decode_settings={"max_batch_sequences": 2, "record_run": file},
    ) as stack:
        async with stack.client() as client:
            flood = [asyncio.create_task(_watch(client, "flood", LONG, done)) for _ in range(FLOOD)]
            await _until_full(stack)
            before = len(done)
            calm = await _watch(client, "calm", 12, done)
            # Of the ten that wait, those may end before it that run when it comes, and on slow
            # machines the next two.
            assert done[before:].index("calm") <= 4, "it waited for a place"
            await asyncio.gather(*flood)
        await stack.quiet()
    model.assert_generates([5] * 8, calm)
    lines = file.read_text().splitlines()
    result = replay(lines)
    assert result.difference is None and result.plans > LONG
    tenants = {line.split('"tenant":"')[1][:16] for line in lines if '"tenant"' in line}
    assert len(tenants) == 3  # with the one that looked whether the cluster answers
    assert all(int(key, 16) for key in tenants)
