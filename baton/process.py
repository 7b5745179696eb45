"""The life of a process: its name, its signals, and background work that may not die in silence."""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
from collections.abc import Coroutine
from typing import Any

log = logging.getLogger(__name__)


def unique_id(prefix: str) -> str:
    """An id for a process that was given none."""
    return f"{prefix}-{secrets.token_hex(4)}"


async def until_stopped() -> None:
    """Return at the first SIGINT or SIGTERM. A second one then kills the process as usual."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, stopped.set)
    try:
        await stopped.wait()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


class Background:
    """Tasks that run beside the main one. An exception in one is logged, never lost."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `work` until it ends or `stop`."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task %s failed", task.get_name(), exc_info=error)

    async def stop(self) -> None:
        """Cancel what still runs and wait for it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
