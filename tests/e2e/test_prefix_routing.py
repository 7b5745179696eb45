"""Conversations on several real workers: each goes on where its KV is, and its tokens are right."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence

import pytest

from baton.client import Client
from gateway.main import GatewayServer
from tests.e2e.conftest import Named, Run
from tests.engine.conftest import VOCAB

BLOCK = 4
OUTPUT = 9


class Talk:
    """Says three tokens at each turn, after all that was said before."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tokens = [self.rng.randrange(3, VOCAB) for _ in range(40)]

    async def turn(self, client: Client, max_tokens: int = OUTPUT) -> tuple[list[int], int]:
        """Returns what was generated, and how much of the prompt was cached."""
        answer = await client.generate_unary(
            self.tokens, max_tokens=max_tokens, token_ids=True, ignore_eos=True
        )
        output = list(answer.message.outputs[0].token_ids)
        self.tokens = [*self.tokens, *output, *(self.rng.randrange(3, VOCAB) for _ in range(3))]
        return output, answer.message.usage.cached_tokens


def known(length: int) -> int:
    """Of a prompt and its output, with so many tokens in all: what the next turn finds."""
    return (length - 1) // BLOCK * BLOCK


async def until_shared(gateways: Sequence[GatewayServer]) -> None:
    """Wait until all have heard what the one that served last knows."""
    async with asyncio.timeout(10):
        while len({len(server.gateway.prefixes) for server in gateways}) > 1:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("gateways", [1, 2])
@pytest.mark.parametrize("prefill", [0, 1])
async def test_interleaved_conversations_find_all_that_was_computed(
    gateways: int, prefill: int, run_stack: Run, named: Named
) -> None:
    model, _ = named("llama")
    settings = {"block_size": BLOCK, "dtype": "float32", "max_batch_tokens": 64}
    async with run_stack(
        model.path, prefill=prefill, decode=2, gateways=gateways, **settings
    ) as stack:
        servers = [stack.gateway, *stack.more_gateways]
        clients = itertools.cycle([Client(server.address) for server in servers])
        one, two = Talk(1), Talk(2)
        first = asyncio.create_task(one.turn(next(clients), 40))
        async with asyncio.timeout(10):
            while not stack.gateway.gateway.generated_tokens():
                await asyncio.sleep(0.001)
        await asyncio.gather(first, two.turn(next(clients)))  # where the other is not
        for talk in (two, one, two, two, one):
            whole = len(talk.tokens) - 3
            await until_shared(servers)
            prompt = talk.tokens
            output, cached = await talk.turn(next(clients))
            assert cached == known(whole)
            model.assert_generates(prompt, output)
        told = stack.metrics.get_sample_value
        if gateways == 1:
            found = told("baton_cached_prompt_tokens_total")
            assert found == told("baton_expected_cached_prompt_tokens_total") > 0
        for client in {next(clients) for _ in servers}:
            await client.close()
        await stack.quiet()
