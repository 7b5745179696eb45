"""Connections to producers: one per incarnation, shared by its pulls, renewing their leases.

A link is made for the first pull, used by all later ones, and given up when its producer is lost,
restarted or not needed for long. Renewals of all its leases go together.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.errors import KvTransferError
from baton.types import KvRef
from kv_transfer.producer import FinalBlocks
from kv_transfer.transport import PeerLost, Run, in_time

log = logging.getLogger(__name__)

_GIVE_UP_SECONDS = 5.0
_IDLE_SECONDS = 300.0
_SHORTEST_RENEWAL = 0.02  # seconds, whatever time to live a producer claims


class Peer(Protocol):
    """One producer incarnation, connected: control calls and a data channel.

    Every method raises KvTransferError when the producer refuses and PeerLost when it is not
    there (any more); none retries.
    """

    @property
    def engine_id(self) -> str:
        """The producer's incarnation."""
        ...

    @property
    def pool_blocks(self) -> int:
        """Blocks of the producer's pool."""
        ...

    @property
    def transport(self) -> str:
        """Name of the data channel's transport."""
        ...

    def follow(self, lease_id: bytes) -> AsyncGenerator[FinalBlocks, None]:
        """News of a lease until its seal. Close it to stop."""
        ...

    async def renew(self, lease_ids: Sequence[bytes]) -> list[float]:
        """Times to live in seconds, 0 for leases that are gone."""
        ...

    async def release(self, lease_id: bytes, *, committed: bool) -> bool:
        """Whether the copy is valid."""
        ...

    async def read(self, run: Run) -> None:
        """Fill and land every target; nothing writes into them once this ends."""
        ...

    async def close(self) -> None:
        """Let go of everything."""
        ...


class Dialer(Protocol):
    """Connects to producers."""

    async def dial(self, control_address: str) -> Peer:
        """Connect to whoever listens there. Raises KvTransferError."""
        ...


class Link:
    """A connected producer, the pulls that use it, and the leases that they have renewed."""

    def __init__(self, peer: Peer, timeout: float) -> None:
        self.peer = peer
        self._timeout = timeout
        self._time_to_live = 0.0
        self._watched: dict[bytes, asyncio.Future[None]] = {}
        self._renewing: asyncio.Task[None] | None = None

    def watch(self, ref: KvRef) -> asyncio.Future[None]:
        """Renew the lease from now on; the future fails when the lease or the producer is gone.
        Pair with `unwatch`."""
        if ref.lease_id in self._watched:
            raise KvTransferError("this lease is being pulled already")
        gone = asyncio.get_running_loop().create_future()
        self._watched[ref.lease_id] = gone
        self._time_to_live = ref.time_to_live
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew_forever())
        return gone

    def unwatch(self, lease_id: bytes) -> None:
        """Renew it no more."""
        gone = self._watched.pop(lease_id)
        if gone.done():
            gone.exception()  # seen
        if not self._watched and self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None

    async def _renew_forever(self) -> None:
        """Every sixth of the time to live, or more often to notice a silent producer in time."""
        heard = time.monotonic()
        while True:
            interval = max(_SHORTEST_RENEWAL, min(self._time_to_live / 6, self._timeout / 4))
            await asyncio.sleep(interval)
            leases = list(self._watched)
            try:
                lives = await in_time(self.peer.renew(leases), self._timeout / 2, "renewal")
            except KvTransferError as error:
                if time.monotonic() - heard >= self._timeout - interval:
                    self._fail(leases, PeerLost(f"producer is silent: {error}"))
                continue
            heard = time.monotonic()
            ended = [lease for lease, left in zip(leases, lives, strict=True) if left <= 0]
            self._fail(ended, KvTransferError("lease expired or was taken back"))

    def _fail(self, leases: Sequence[bytes], error: KvTransferError) -> None:
        for lease_id in leases:
            gone = self._watched.get(lease_id)
            if gone is not None and not gone.done():
                gone.set_exception(error)


@dataclass(frozen=True, slots=True)
class Hold:
    """A lease that is kept alive; `gone` fails when it or its producer is gone."""

    peer: Peer
    gone: asyncio.Future[None]


class _Entry:
    """A link or the attempt to make one."""

    __slots__ = ("address", "link", "stale", "used_at", "users")

    def __init__(self, address: str, link: asyncio.Task[Link]) -> None:
        self.address = address
        self.link = link
        self.users = 0
        self.used_at = time.monotonic()
        self.stale = False  # for no new pull

    def serves(self, engine_id: str) -> bool:
        """Whether it leads, or may lead, to this incarnation."""
        if not self.link.done():
            return True
        failed = self.link.cancelled() or self.link.exception() is not None
        return not failed and self.link.result().peer.engine_id == engine_id


class Links:
    """The links of one consumer, by control address. `timeout` is the longest silence of a
    producer in seconds."""

    def __init__(self, dialer: Dialer, timeout: float) -> None:
        self._dialer = dialer
        self._timeout = timeout
        self._entries: dict[str, _Entry] = {}
        self._background: set[asyncio.Task[None]] = set()

    @property
    def addresses(self) -> list[str]:
        """Whom new pulls would find connected."""
        return list(self._entries)

    @contextlib.asynccontextmanager
    async def hold(self, ref: KvRef) -> AsyncGenerator[Hold, None]:
        """Connect to the incarnation that granted `ref` and renew the lease while the block runs.
        If the block fails, the lease is given up; if it fails by PeerLost, or there is no way
        there, the next pull connects anew."""
        entry = self._entry(ref)
        entry.users += 1
        try:
            link = await asyncio.shield(entry.link)
            if link.peer.engine_id != ref.engine_id:
                raise PeerLost(
                    f"producer at {ref.control_address} restarted: it is {link.peer.engine_id}, "
                    f"the lease is from {ref.engine_id}"
                )
            gone = link.watch(ref)
            try:
                yield Hold(link.peer, gone)
            except BaseException:
                entry.users += 1
                self._spawn(self._give_up(entry, link.peer, ref.lease_id))
                raise
            finally:
                link.unwatch(ref.lease_id)
        except PeerLost:
            self._forget(entry)
            raise
        finally:
            self._leave(entry)

    async def close(self) -> None:
        """Disconnect from every producer, once nobody uses it."""
        for entry in list(self._entries.values()):
            self._forget(entry)
        await asyncio.gather(*self._background, return_exceptions=True)

    def _entry(self, ref: KvRef) -> _Entry:
        entry = self._entries.get(ref.control_address)
        if entry is not None and entry.serves(ref.engine_id):
            return entry
        for other in list(self._entries.values()):
            idle = other.users == 0 and time.monotonic() - other.used_at > _IDLE_SECONDS
            if other is entry or idle:
                self._forget(other)
        entry = _Entry(ref.control_address, asyncio.create_task(self._dial(ref.control_address)))
        self._entries[entry.address] = entry
        return entry

    async def _dial(self, address: str) -> Link:
        peer = await in_time(self._dialer.dial(address), self._timeout, "connecting")
        return Link(peer, self._timeout)

    def _leave(self, entry: _Entry) -> None:
        """One user less."""
        entry.users -= 1
        entry.used_at = time.monotonic()
        if entry.stale and entry.users == 0:
            self._spawn(_hang_up(entry.link))

    def _forget(self, entry: _Entry) -> None:
        """Use it for no new pull; disconnect when the last one has ended."""
        if self._entries.get(entry.address) is entry:
            del self._entries[entry.address]
        if not entry.stale:
            entry.stale = True
            if entry.users == 0:
                self._spawn(_hang_up(entry.link))

    async def _give_up(self, entry: _Entry, peer: Peer, lease_id: bytes) -> None:
        """Let the producer free the blocks now rather than when the lease expires."""
        try:
            await in_time(peer.release(lease_id, committed=False), _GIVE_UP_SECONDS, "release")
        except KvTransferError as error:
            log.debug("lease %s left to expire: %s", lease_id.hex(), error)
        finally:
            self._leave(entry)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _hang_up(link: asyncio.Task[Link]) -> None:
    with contextlib.suppress(KvTransferError):
        await (await link).peer.close()
