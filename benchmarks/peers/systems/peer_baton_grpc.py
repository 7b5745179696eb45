"""Baton as it is served: a client, a gateway and workers, each a process of its own, over gRPC."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Any, TypeVar

from serving import Answers, Ask, Setup, serve

from baton.client import Client, Text
from baton.config import ServeConfig, load
from launcher.cluster import LocalCluster

T = TypeVar("T")
_START_SECONDS = 300.0


class BatonCluster:
    """One cluster, and one client in this process. `prefill_workers` is an option of the setup."""

    def __init__(self, setup: Setup) -> None:
        # a run is a flood on purpose: it may wait
        os.environ["BATON_QUEUE_TIMEOUT"] = "600"
        os.environ["BATON_KV_MEMORY"] = str(2 * 2**30)
        flags: dict[str, Any] = {
            "model": setup.model,
            "address": "127.0.0.1:0",
            "prefill_workers": int(setup.options.get("prefill_workers", 0)),
            "dtype": "bfloat16",
            "max_batch_tokens": setup.max_tokens,
            "max_batch_sequences": setup.max_sequences,
            "start_timeout": _START_SECONDS,
        }
        if setup.precision == "int8":
            flags["quantization"] = "int8"
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._stack = AsyncExitStack()
        self._client = self._wait(self._start(load(ServeConfig, flags)))
        self.about = {"baton": version("baton-serve")}

    def run(self, requests: list[Ask], answers: Answers) -> None:
        """A stream per request, all at once."""
        self._wait(self._ask_all(requests, answers))

    def close(self) -> None:
        """Stop all processes."""
        self._wait(self._stack.aclose())

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self, config: ServeConfig) -> Client:
        cluster = await self._stack.enter_async_context(LocalCluster(config, _log))
        return await self._stack.enter_async_context(Client(cluster.address))

    async def _ask_all(self, requests: list[Ask], answers: Answers) -> None:
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(requests):
                group.create_task(self._ask(number, request, answers))

    async def _ask(self, number: int, request: Ask, answers: Answers) -> None:
        stream = self._client.generate(
            request.prompt,
            max_tokens=request.output,
            ignore_eos=True,
            temperature=0.0,
            token_ids=True,
        )
        async for event in stream:
            if isinstance(event, Text):
                answers.add(number, event.message.token_ids)


def _log(name: str, line: str) -> None:
    print(f"{name}: {line}", file=sys.stderr)


if __name__ == "__main__":
    serve(BatonCluster)
