"""`baton top`: the state of the cluster, live, once, or as JSON."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from rich.console import Console

from baton.client import Client
from baton.errors import Aborted, BatonError, Unavailable
from baton.v1.model_pb2 import ClusterStatus
from launcher.dashboard import display_for
from launcher.generate import describe
from launcher.interrupt import interruptible

PATIENCE = 5.0  # seconds that a snapshot may be late


@dataclass(frozen=True, slots=True)
class View:
    """What the command line asks for; `interval` in seconds."""

    address: str
    interval: float = 1.0
    once: bool = False
    as_json: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """No snapshot could be had, and why; it is tried again."""

    reason: str


async def run(view: View) -> int:
    """Show the cluster until interrupted, or once; returns the exit code."""
    work = _once(view) if view.once else _watch(view)
    try:
        await interruptible(work)
    except BatonError as error:
        print(f"baton: {describe(error)}", file=sys.stderr)
        return 1
    return 0


async def _once(view: View) -> None:
    async with Client(view.address) as client:
        status = await client.status(timeout=PATIENCE)
    with display_for(Console(), view.address, live=False, as_json=view.as_json) as display:
        display.show(status)


async def _watch(view: View) -> None:
    console = Console()
    with display_for(
        console, view.address, live=console.is_terminal, as_json=view.as_json
    ) as display:
        async with aclosing(follow(view.address, view.interval)) as news:
            async for item in news:
                if isinstance(item, Lost):
                    display.lost(item.reason)
                else:
                    display.show(item)


async def follow(
    address: str, interval: float, patience: float = PATIENCE
) -> AsyncGenerator[ClusterStatus | Lost, None]:
    """Snapshots of the cluster, for ever. A gateway that goes away, or is silent for `patience`
    seconds too long, is Lost and tried again. Raises BatonError where that would not help."""
    while True:
        pause = 1.0
        try:
            # A new channel each time: an old one waits longer and longer before it tries again.
            async with Client(address) as client, aclosing(client.watch_status(interval)) as stream:
                while True:
                    async with asyncio.timeout(interval + patience):
                        status = await anext(stream, None)
                    if status is None:
                        yield Lost("the gateway ended the stream")
                        break
                    yield status
        except (Unavailable, Aborted) as error:
            pause = error.retry_after if isinstance(error, Unavailable) else pause
            yield Lost(describe(error))
        except TimeoutError:
            yield Lost(f"no answer for {interval + patience:g} s")
        await asyncio.sleep(pause)
