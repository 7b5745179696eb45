"""What every gateway does for the shared queue besides its own requests: signs of life, sweeps,
promotions. Each on its own timer, so that one slow answer delays nothing else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from baton.errors import DeadlineExceeded, QueueError, Unavailable
from gateway.dispatch import Dispatcher
from gateway.session import Session
from gateway.sessions import Sessions
from queueing.contract import GatewayQueue

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 2.0
SWEEP_SECONDS = 0.5


class Housekeeping:
    """Timers on the queue. Redis being away stops none of them."""

    def __init__(self, queue: GatewayQueue, sessions: Sessions, dispatcher: Dispatcher) -> None:
        self._queue = queue
        self._sessions = sessions
        self._dispatcher = dispatcher

    async def run(self) -> None:
        """Keep house until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_every(HEARTBEAT_SECONDS, self.heartbeat))
            group.create_task(_every(SWEEP_SECONDS, self.sweep))
            group.create_task(_every(SWEEP_SECONDS, self.promote))

    async def heartbeat(self) -> None:
        """Say that this gateway lives; tell a server that lost its data what there is."""
        if not await self._queue.heartbeat():
            live = self._sessions.live()
            created = await self._queue.reconcile(live)
            if live:
                log.warning("the queue had lost data: %d requests told again", created)
            for one in live:  # some have ended meanwhile
                self._find(one.submission.request_id)

    async def sweep(self) -> None:
        """Expire what is overdue, and act on what became of our own requests."""
        reaped = await self._queue.reap()
        for request_id in reaped.failed:
            if session := self._sessions.get(request_id):
                session.fail(Unavailable("too many workers failed to serve the request"))
        for request_id in reaped.timed_out:
            if session := self._find(request_id):
                session.fail(DeadlineExceeded("the request did not finish in time"))
        for request_id in reaped.requeued:
            if session := self._find(request_id):
                log.warning("request %s: its worker is gone", request_id)
                await self._dispatcher.take_back(session)

    def _find(self, request_id: str) -> Session | None:
        """A session that the queue believes to be live. If it has ended, the queue was away when
        it was told: it is told again, else nobody would ever end the request there."""
        session = self._sessions.get(request_id)
        if session is None:
            self._sessions.disown(request_id)
        return session

    async def promote(self) -> None:
        """Lift requests that waited too long."""
        if await self._queue.promote():
            self._dispatcher.wake()


async def _every(interval: float, work: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await work()
        except QueueError as error:
            log.debug("the queue cannot be reached: %s", error)
        except Exception:
            log.exception("housekeeping failed")
        await asyncio.sleep(interval)
