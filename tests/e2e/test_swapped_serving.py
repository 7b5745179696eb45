"""A cluster whose decode worker swaps: tokens equal transformers' own, and the run replays."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from scheduling.simulator.replay import replay
from tests.e2e.conftest import Named, Run
from tests.e2e.test_exactness import generate
from tests.engine.conftest import VOCAB


@pytest.mark.parametrize("swapping", ["proactive", "reactive"])
async def test_tokens_are_right_while_kv_goes_to_the_host_and_back(
    swapping: str, run_stack: Run, named: Named, tmp_path: Path
) -> None:
    model, _ = named("llama")
    chooser = random.Random(swapping)
    prompts = [[chooser.randrange(3, VOCAB) for _ in range(10 + 4 * i)] for i in range(6)]
    file = tmp_path / "run.jsonl"
    async with run_stack(
        model.path,
        block_size=4,
        dtype="float32",
        decode_settings={
            "kv_blocks": 24,
            "admission": "paged",
            "preemption": "swap",
            "swapping": swapping,
            "host_kv_memory": 2**18,
            "record_run": file,
        },
    ) as stack:
        async with stack.client() as client:
            outputs = await asyncio.gather(*(generate(client, p, max_tokens=24) for p in prompts))
        await stack.quiet()
    for prompt, output in zip(prompts, outputs, strict=True):
        model.assert_generates(prompt, output[0])
        assert len(output[0]) == 24
    assert stack.decoded("kv_swap_bytes_total", direction="in") > 0
    result = replay(file.read_text().splitlines())
    assert result.difference is None
    assert result.plans > 24
