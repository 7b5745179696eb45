"""What Ctrl-C and SIGTERM do to a command that owns other processes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def interruptible(work: Coroutine[Any, Any, T]) -> T | None:
    """Run `work`, cancelled at SIGINT or SIGTERM: it stops what it owns in order, and at once when
    a second signal cancels that too. None when it was interrupted."""
    task = asyncio.create_task(work)
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for number in signals:
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        if not task.cancelled():  # somebody cancelled us, not the work
            raise
        return None
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
