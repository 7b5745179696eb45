"""A worker's heartbeat: registers it, then reports all of its requests once per interval."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from baton.errors import QueueError
from baton.types import Load
from queueing.contract import Progress, ProgressReply, Verdict, WorkerQueue

log = logging.getLogger(__name__)


class Reporter:
    """Drives a WorkerQueue. Redis being away stops nothing: the next report tells it all again.

    `collect` gives what the worker holds now, `load` how busy it is, `drop` ends a request that
    is no longer this worker's.
    """

    def __init__(
        self,
        queue: WorkerQueue,
        *,
        interval: float,
        settle: float,
        collect: Callable[[], Sequence[Progress]],
        load: Callable[[], Load],
        drop: Callable[[Progress, Verdict], None],
    ) -> None:
        """`settle` seconds after a registration, STALE verdicts are not acted upon: a server that
        lost its data needs that long to be told by the gateways who holds what."""
        self._queue = queue
        self._interval, self._settle = interval, settle
        self._collect, self._load, self._drop = collect, load, drop
        self._settled_at = 0.0

    async def register(self) -> None:
        """Enter the registry, however long the server takes to come up."""
        while True:
            try:
                epoch = await self._queue.register()
            except QueueError as error:
                log.warning("cannot register, trying again: %s", error)
                await asyncio.sleep(self._interval * 5)
            else:
                log.info("registered, epoch %d", epoch)
                return

    async def run(self) -> None:
        """Report until cancelled."""
        reachable = True
        while True:
            await asyncio.sleep(self._interval)
            progress = self._collect()
            try:
                replies = await self._queue.report(progress, self._load())
            except QueueError as error:
                if reachable:
                    log.warning("reports are not getting through: %s", error)
                reachable = False
                continue
            if not reachable:
                log.info("reports get through again")
            reachable = True
            if replies is None:
                log.warning("the registry does not know this worker any more")
                await self.register()
                self._settled_at = time.monotonic() + self._settle
            else:
                self._act(progress, replies)

    def _act(self, progress: Sequence[Progress], replies: Sequence[ProgressReply]) -> None:
        settling = time.monotonic() < self._settled_at
        for entry, reply in zip(progress, replies, strict=True):
            if reply.verdict is Verdict.CONTINUE or (settling and reply.verdict is Verdict.STALE):
                continue
            log.info("request %s is no longer ours (%s)", entry.request_id, reply.verdict.name)
            self._drop(entry, reply.verdict)
