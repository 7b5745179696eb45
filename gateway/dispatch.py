"""Gives waiting requests to workers, in the order that the queue decides.

Wakes on submissions, on room and on a tick; asks the queue what a worker may have now, pairs it
with a decode worker, and starts an attempt for each request. Where workers have the beginnings of
prompts that wait, it asks the other way round: what is next, and then which worker suits that. A
failed attempt puts its request back into the queue, where it stands in its old place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from itertools import zip_longest

from baton.errors import BatonError, QueueError, Unavailable
from baton.types import Claim
from gateway.attempt import Attempt, Workers
from gateway.decode_link import DecodeLink
from gateway.fleet import Fleet, PrefillPeer
from gateway.outcome import WorkerBusy, WorkerFailed
from gateway.placing import Placing, can_pair
from gateway.session import Session
from gateway.sessions import Sessions
from queueing.contract import Claimed, GatewayQueue, WorkerRecord

log = logging.getLogger(__name__)

Offer = Callable[[WorkerRecord, list[DecodeLink], PrefillPeer | None], Awaitable[None]]

CLAIM_LIMIT = 8  # requests claimed in one call
LOOK_LIMIT = 16  # requests that a worker is looked for at a time
TICK_SECONDS = 0.05  # while something waits
IDLE_SECONDS = 1.0
QUEUE_PAUSE = 0.5  # after the queue did not answer
GIVE_BACK_TRIES = 5
GIVE_BACK_PAUSE = 0.2


class _Placed(Enum):
    """What came of the look for a worker."""

    BEGUN = auto()
    PASSED = auto()  # those behind it may go first: it waits for a better worker
    NO_ROOM = auto()


@dataclass(frozen=True, slots=True)
class _Way:
    """Who may serve a request: without a helper, the decode worker prefills by itself."""

    link: DecodeLink
    helper: PrefillPeer | None

    @property
    def computes(self) -> WorkerRecord:
        """Who computes the prompt: the claim is for that one."""
        return self.link.record if self.helper is None else self.helper.record


class Dispatcher:
    """Runs the attempts of this gateway's sessions."""

    def __init__(self, queue: GatewayQueue, max_attempts: int, placing: Placing) -> None:
        """`bind` must follow: sessions and fleet wake the dispatcher, which works on both."""
        self._queue = queue
        self._placing = placing
        self._sessions: Sessions
        self._fleet: Fleet
        self._max_attempts = max_attempts
        self._woken = asyncio.Event()
        self._attempts: dict[str, asyncio.Task[None]] = {}

    def bind(self, sessions: Sessions, fleet: Fleet) -> None:
        """Say whose requests go where."""
        self._sessions, self._fleet = sessions, fleet

    def wake(self) -> None:
        """Something waits, or there may be room."""
        self._woken.set()

    def stop(self, session: Session) -> None:
        """The session is over: free what its attempt holds."""
        if (attempt := self._attempts.get(session.id)) is not None:
            attempt.cancel()

    async def run(self) -> None:
        """Dispatch until cancelled."""
        while True:
            tick = TICK_SECONDS if self._sessions.waiting else IDLE_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(tick):
                    await self._woken.wait()
            self._woken.clear()
            try:
                await self._round()
            except QueueError as error:
                log.warning("nothing can be claimed: %s", error)
                await asyncio.sleep(QUEUE_PAUSE)
            except Exception:
                log.exception("dispatching failed")
                await asyncio.sleep(QUEUE_PAUSE)

    async def close(self) -> None:
        """End every attempt."""
        attempts = list(self._attempts.values())
        for attempt in attempts:
            attempt.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)

    async def _round(self) -> None:
        """Offer each worker that has room what waits for it. Then offer all of them, room or not,
        what waits of tenants that have less than their share there: what others have sent ahead
        gives way to it on the worker (scheduling/shares.py)."""
        now = time.monotonic()
        links = [link for link in self._fleet.decode.values() if link.is_usable(now)]
        if self._sessions.drawn:
            await self._place_each(links, now)
        else:
            await self._offer_all([link for link in links if link.openings], now, self._offer)
        if self._sessions.tenants > 1 and self._owed(links):
            if self._sessions.drawn:
                await self._place_each(links, now, owed=True)
            else:
                await self._offer_all(links, now, self._offer_owed)

    async def _offer_all(self, links: list[DecodeLink], now: float, offer: Offer) -> None:
        if not self._sessions.waiting:
            return
        peers = [peer for peer in self._fleet.prefill.values() if peer.is_usable(now)]
        paired = False
        for peer in self._placing.peers(peers):
            matching = [link for link in links if can_pair(peer.record, link.record)]
            paired = paired or bool(matching)
            if matching and peer.accepts(now):
                await offer(peer.record, matching, peer)
        if not paired:  # nobody prefills for these: they do it themselves
            for link in self._placing.links(links):
                await offer(link.record, [link], None)

    async def _offer(
        self, worker: WorkerRecord, links: list[DecodeLink], peer: PrefillPeer | None
    ) -> None:
        while self._sessions.waiting:
            limit = min(CLAIM_LIMIT, sum(link.openings for link in links))
            if not limit:
                return
            claimed = await self._queue.claim(worker, limit)
            for one in claimed:
                link = self._link_for(one, links)
                await self._begin(one, link, peer)
                await asyncio.sleep(0)  # the attempt opens its slot, which counts for the next
            if len(claimed) < limit:
                return

    async def _offer_owed(
        self, worker: WorkerRecord, links: list[DecodeLink], peer: PrefillPeer | None
    ) -> None:
        while owed := self._owed(links):
            claimed = await self._queue.claim(worker, 1, owed)
            if not claimed:
                return
            session = self._sessions.get(claimed[0].request_id)
            tenant = owed[0] if session is None else session.job.tenant
            owing = [link for link in links if link.owes(tenant, self._sessions.tenants)]
            link = self._link_for(claimed[0], owing or links)
            await self._begin(claimed[0], link, peer)
            await asyncio.sleep(0)

    def _owed(self, links: list[DecodeLink]) -> list[str]:
        """Tenants whose requests wait and that have less than their share of one of these."""
        tenants = max(1, self._sessions.tenants)
        waiting = self._sessions.waiting_tenants
        return [t for t in waiting if any(link.owes(t, tenants) for link in links)]

    def _link_for(self, claimed: Claimed, links: list[DecodeLink]) -> DecodeLink:
        """The decode worker that a claimed request goes to: one that may be sent more, if any."""
        open_links = [link for link in links if link.openings] or links
        session = self._sessions.get(claimed.request_id)
        if session is None or len(open_links) == 1:
            return open_links[0]
        cached = self._placing.cached(session, self._fleet)
        return self._placing.links(open_links, session, cached)[0]

    async def _place_each(self, links: list[DecodeLink], now: float, *, owed: bool = False) -> None:
        """Find a worker for each request that waits, in the queue's order. With `owed`, for those
        of tenants that have less than their share, on workers where they have."""
        while self._sessions.waiting:
            tenants = self._owed(links) if owed else []
            if not (tenants or (not owed and any(link.openings for link in links))):
                return
            ids = self._sessions.waiting_ids
            if len(ids) > 1:
                ids = await self._queue.next_up(LOOK_LIMIT, tenants)
            begun = 0
            for id in ids:
                if (session := self._sessions.get(id)) is None:
                    self._sessions.disown(id)
                    continue
                placed = await self._place(session, links, now, tenants)
                if placed is _Placed.NO_ROOM:
                    return
                begun += placed is _Placed.BEGUN
                await asyncio.sleep(0)
            if not begun or len(ids) < LOOK_LIMIT:
                return

    async def _place(
        self, session: Session, links: list[DecodeLink], now: float, owed: list[str]
    ) -> _Placed:
        """Claim the request for the best worker that has room. It is passed if one without room is
        so much better that waiting is. `owed`: tenants as in `_place_each`; empty: all."""
        cached = self._placing.cached(session, self._fleet)

        def holds(best: WorkerRecord, other: WorkerRecord) -> bool:
            more = cached.get(best.id, 0) - cached.get(other.id, 0)
            return self._placing.is_worth_waiting(session, more, now)

        ranked = self._placing.links(links, session, cached)
        tenant, tenants = session.job.tenant, self._sessions.tenants
        open_links = [
            link for link in ranked if (link.owes(tenant, tenants) if owed else link.openings)
        ]
        if not open_links:
            return _Placed.PASSED if owed else _Placed.NO_ROOM
        if holds(ranked[0].record, open_links[0].record):
            return _Placed.PASSED
        ways = self._ways(open_links, cached, now)
        for way, other in zip_longest(ways, ways[1:]):
            if await self._claim(session, way, now, owed):
                return _Placed.BEGUN
            if other is not None and holds(way.computes, other.computes):
                return _Placed.PASSED
        return _Placed.NO_ROOM

    def _ways(self, links: list[DecodeLink], cached: Mapping[str, int], now: float) -> list[_Way]:
        """Best first."""
        best = links[0]
        helpers = [
            peer
            for peer in self._fleet.prefill.values()
            if peer.is_usable(now) and can_pair(peer.record, best.record)
        ]
        if not helpers:
            return [_Way(link, None) for link in links]
        ways = [_Way(best, peer) for peer in self._placing.peers(helpers, cached)]
        if best.record.id in cached:
            ways.insert(0, _Way(best, None))
        return ways

    async def _claim(self, session: Session, way: _Way, now: float, owed: list[str]) -> bool:
        """Begin the request that way, if its worker may have it now."""
        if way.helper is not None and not way.helper.accepts(now):
            return False
        claimed = await self._queue.claim(way.computes, 1, owed, only=session.id)
        for one in claimed:
            await self._begin(one, way.link, way.helper)
        return bool(claimed)

    async def _begin(self, claimed: Claimed, link: DecodeLink, helper: PrefillPeer | None) -> None:
        session = self._sessions.get(claimed.request_id)
        if session is None:
            self._sessions.disown(claimed.request_id)  # cancelled while the queue gave it away
            return
        await self._end_attempt(session)  # the queue took it from a worker that it believes dead
        worker = link.record if helper is None else helper.record
        self._sessions.claimed(session, claimed, worker.id)
        if not session.over:
            workers = self._placing.sent(session, link, helper)
            task = asyncio.create_task(self._serve(session, claimed.claim, workers))
            self._attempts[session.id] = task

    async def take_back(self, session: Session) -> None:
        """The queue took the request from its worker: end that attempt, let it wait again."""
        claim = session.claim
        await self._end_attempt(session)
        if session.claim == claim:  # else the queue has given it to the next worker meanwhile
            await self._requeue(session, fault=False, waits_anew=True)

    async def _end_attempt(self, session: Session) -> None:
        if (attempt := self._attempts.get(session.id)) is not None:
            attempt.cancel()
            await asyncio.gather(attempt, return_exceptions=True)

    async def _serve(self, session: Session, claim: Claim, workers: Workers) -> None:
        """Run an attempt and settle what came of it."""
        if not session.generated:
            session.stages.queue = time.monotonic() - session.job.request.arrived_at
        me = asyncio.current_task()
        try:
            await Attempt(session, claim, workers, self._queue).run()
        except WorkerBusy as error:
            log.debug("request %s: %s", session.id, error)
            await self._requeue(session, fault=False, waits_anew=False)
        except WorkerFailed as error:
            log.warning("request %s, attempt %d: %s", session.id, claim.attempt, error)
            await self._requeue(session, fault=True, waits_anew=True)
        except BatonError as error:
            session.fail(error)
        except Exception as error:
            log.exception("request %s failed", session.id)
            session.fail(error)
        finally:
            if self._attempts.get(session.id) is me:
                del self._attempts[session.id]
            self.wake()

    async def _requeue(self, session: Session, *, fault: bool, waits_anew: bool) -> None:
        """Back into the queue with what it has; the end after too many attempts. `waits_anew` as
        in Sessions.requeued."""
        claim = session.claim
        if session.over or claim is None:
            return
        if fault and claim.attempt >= self._max_attempts:
            session.fail(Unavailable(f"{claim.attempt} workers failed to serve the request"))
            return
        for _ in range(GIVE_BACK_TRIES):
            try:
                await self._queue.give_back(session.id, claim, session.generated, fault=fault)
            except QueueError:
                await asyncio.sleep(GIVE_BACK_PAUSE)
            else:
                # Also when the claim was stale: then the queue has put it back by itself, and may
                # have given it to the next worker.
                if session.claim == claim:
                    self._sessions.requeued(session, waits_anew=waits_anew)
                return
        session.fail(Unavailable("the worker failed and the queue cannot be reached"))
