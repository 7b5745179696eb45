"""The live requests of this gateway: admission, timers, and the end in the queue."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from baton.errors import AlreadyExists, DeadlineExceeded, Overloaded, QueueError, Unavailable
from baton.types import FinishReason, Request
from gateway.job import Job
from gateway.pace import Pace
from gateway.session import Session, State
from gateway.tokenizer import Tokenizer
from queueing.contract import Claimed, GatewayQueue, Live, Outcome, Submission

log = logging.getLogger(__name__)

FINISH_TRIES = 3
FINISH_PAUSE = 0.5
CLOSE_SECONDS = 2.0


class Cancelled(Exception):
    """The client went away: nobody sees this."""


class Sessions:
    """Owns every session from submission to the end in the queue."""

    def __init__(
        self,
        queue: GatewayQueue,
        tokenizer: Tokenizer,
        model: str,
        pace: Pace,
        *,
        on_waiting: Callable[[], None],
        on_done: Callable[[Session], None],
        cached: Callable[[Session], int] = lambda session: 0,
    ) -> None:
        """`on_waiting` is called when a request waits, or room may have come free; `on_done`
        when a session is over. `cached`: tokens of its prompt that a worker is expected to have."""
        self.accepting = True
        self._queue = queue
        self._tokenizer = tokenizer
        self._model = model
        self._pace = pace
        self._on_waiting = on_waiting
        self._on_done = on_done
        self._cached = cached
        self._live: dict[str, Session] = {}
        self._submissions: dict[str, Submission] = {}  # as the queue was told
        self._idle = asyncio.Event()
        self._idle.set()
        self._waiting: set[str] = set()  # requests that no worker has
        self._waiting_of: dict[str, set[str]] = {}  # the same, by tenant
        self._drawn: set[str] = set()  # those of them that some worker has a part of
        self._tenants: Counter[str] = Counter()  # live requests
        self._timers: dict[str, list[asyncio.TimerHandle]] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}  # the queue is being told

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._live.values()))

    def get(self, request_id: str) -> Session | None:
        """A live session."""
        return self._live.get(request_id)

    @property
    def waiting(self) -> int:
        """Requests that no worker has."""
        return len(self._waiting)

    @property
    def waiting_ids(self) -> list[str]:
        """Those."""
        return list(self._waiting)

    @property
    def drawn(self) -> bool:
        """Whether some of them are better off with one worker than with another: when they came, it
        had a part of their prompt."""
        return bool(self._drawn)

    @property
    def waiting_tenants(self) -> list[str]:
        """Those with requests that no worker has."""
        return list(self._waiting_of)

    @property
    def tenants(self) -> int:
        """How many tenants have live requests."""
        return len(self._tenants)

    async def open(self, job: Job) -> Session:
        """Queue a request. Raises AlreadyExists, Overloaded, or Unavailable while draining or
        without Redis."""
        request = job.request
        if (ending := self._ending.get(request.id)) is not None:
            await asyncio.wait({ending}, timeout=FINISH_PAUSE)
        if not self.accepting:
            raise Unavailable("this gateway is shutting down")
        if request.id in self._live:
            raise AlreadyExists(f"request id {request.id!r} is in use")
        session = Session(
            job, self._model, self._tokenizer, clock=time.monotonic, on_done=self._end
        )
        self._live[request.id] = session
        self._tenants[job.tenant] += 1
        self._timers[request.id] = []
        self._idle.clear()
        try:
            cached = session.expected_cached = self._cached(session)
            submission = self._pace.submission(job, _time_left(request), cached)
            self._submissions[request.id] = submission
            level = await self._queue.submit(submission)
        except (Overloaded, AlreadyExists):
            if not session.over:  # Abort may come before this reply
                self._forget(request.id)
            raise
        except BaseException:  # cancelled, or the reply was lost: it may be in the queue
            session.fail(Cancelled())
            raise
        self._arm(session)
        if session.claim is None and not session.over:  # so may a worker
            session.level = level
            self._wait(session)
        return session

    def cancel(self, session: Session) -> None:
        """The client went away. Harmless when the session is over."""
        session.fail(Cancelled())

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """End live requests, keeping what they have; returns those that were live."""
        found = [s for s in map(self._live.get, dict.fromkeys(request_ids)) if s is not None]
        for session in found:
            session.end(FinishReason.ABORTED)
        return [session.id for session in found]

    def claimed(self, session: Session, claimed: Claimed, worker_id: str) -> None:
        """A worker has it."""
        if session.over:
            return
        if session.state is not State.QUEUED:
            session.move(State.QUEUED)
        self._waits_no_more(session)
        session.claimed(claimed.claim, claimed.level, worker_id)

    def requeued(self, session: Session, *, waits_anew: bool) -> None:
        """A worker gave it up, or lost it. Then it may wait as long as a new request, however long
        it was served; but a worker that was merely busy does not prolong the wait."""
        if session.over:
            return
        session.claim = session.worker_id = None
        if session.state is not State.QUEUED:
            session.move(State.QUEUED)
        self._wait(session, restart=waits_anew)

    def disown(self, request_id: str) -> None:
        """The queue thinks that a request of ours lives, which does not."""
        if request_id not in self._ending:
            self._tell_end(request_id, Outcome.CANCELLED, 0)

    def live(self) -> list[Live]:
        """All of them, as reconcile tells them to a server that lost its data."""
        now = time.monotonic()
        return [
            Live(
                submission=replace(
                    self._submissions[session.id], time_to_live=_time_left(session.job.request)
                ),
                level=session.level,
                generated=session.generated,
                worker_id=session.worker_id,
                claim=session.claim,
                age=now - session.job.request.arrived_at,
            )
            for session in self._live.values()
        ]

    async def wait_idle(self) -> None:
        """Return when no request lives."""
        await self._idle.wait()

    async def close(self) -> None:
        """End everything and wait until the queue knows."""
        self.accepting = False
        for session in self:
            session.end(FinishReason.ABORTED)
        ending = list(self._ending.values())
        if ending:
            await asyncio.wait(ending, timeout=CLOSE_SECONDS)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    # Timers.

    def _arm(self, session: Session) -> None:
        job, now = session.job, time.monotonic()
        if job.time_limit is not None:
            left = job.request.arrived_at + job.time_limit - now
            self._call_later(session, left, session.end, FinishReason.TIME_LIMIT)
        if job.request.deadline is not None:
            error = DeadlineExceeded("the request did not finish in time")
            self._call_later(session, job.request.deadline - now, session.fail, error)

    def _wait(self, session: Session, *, restart: bool = True) -> None:
        """It waits for a worker, and not for ever."""
        now = time.monotonic()
        if restart:
            session.waiting_since = now
        self._waiting.add(session.id)
        if session.expected_cached:
            self._drawn.add(session.id)
        self._waiting_of.setdefault(session.job.tenant, set()).add(session.id)
        left = session.waiting_since + session.job.queue_timeout - now
        if restart:
            self._call_later(session, left, self._queue_timed_out, session, session.waiting_since)
        elif left <= 0:
            self._queue_timed_out(session, session.waiting_since)
        self._on_waiting()

    def _waits_no_more(self, session: Session) -> None:
        self._waiting.discard(session.id)
        self._drawn.discard(session.id)
        if waiting := self._waiting_of.get(session.job.tenant):
            waiting.discard(session.id)
            if not waiting:
                del self._waiting_of[session.job.tenant]

    def _queue_timed_out(self, session: Session, since: float) -> None:
        bounced = session.state is State.RESERVING  # it may be refused again
        if session.waiting_since == since and (session.state is State.QUEUED or bounced):
            session.fail(Overloaded("no worker had room in time", subject="queue"))

    def _call_later(
        self, session: Session, delay: float, callback: Callable[..., None], *args: object
    ) -> None:
        if not session.over:
            handle = asyncio.get_running_loop().call_later(max(0.0, delay), callback, *args)
            self._timers[session.id].append(handle)

    # The end.

    def _end(self, session: Session) -> None:
        self._waits_no_more(session)
        self._forget(session.id)
        self._on_done(session)
        self._tell_end(session.id, _outcome(session), session.generated)

    def _forget(self, request_id: str) -> None:
        tenant = self._live.pop(request_id).job.tenant
        self._tenants[tenant] -= 1
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        self._submissions.pop(request_id, None)
        for timer in self._timers.pop(request_id):
            timer.cancel()
        if not self._live:
            self._idle.set()

    def _tell_end(self, request_id: str, outcome: Outcome, generated: int) -> None:
        work = self._finish(request_id, outcome, generated)
        self._ending[request_id] = asyncio.create_task(work, name=f"finish {request_id}")

    async def _finish(self, request_id: str, outcome: Outcome, generated: int) -> None:
        """Tell the queue, which would otherwise find out when the request's time is up."""
        try:
            for _ in range(FINISH_TRIES):
                try:
                    await self._queue.finish(request_id, outcome, generated)
                except QueueError as error:
                    log.warning("request %s: its end is not recorded: %s", request_id, error)
                    await asyncio.sleep(FINISH_PAUSE)
                else:
                    return
        finally:
            if self._ending.get(request_id) is asyncio.current_task():
                del self._ending[request_id]
            self._on_waiting()  # its place on a worker is free now


def _time_left(request: Request) -> float | None:
    return None if request.deadline is None else max(0.001, request.deadline - time.monotonic())


def _outcome(session: Session) -> Outcome:
    match session.error:
        case None:
            return Outcome.FINISHED
        case Cancelled():
            return Outcome.CANCELLED
        case DeadlineExceeded() | Overloaded():
            return Outcome.TIMED_OUT
        case _:
            return Outcome.ERROR
