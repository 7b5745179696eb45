"""The consumer: pulls leased blocks, checks them, keeps leases alive, has the copy confirmed.

    CONNECTING ──▶ PULLING ──▶ LANDED ──▶ COMMITTED
         │            │           │
         └────────────┴───────────┴──▶ QUIET ──▶ failed or cancelled

A pull leaves PULLING only when its transport writes no more, so the caller owns its pages again
the moment `pull` ends. Knows no transport and no RPC: a Dialer brings both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.errors import KvTransferError
from baton.types import KvRef
from kv_transfer.contract import BlockStore, KvLayout, PullReport
from kv_transfer.producer import FinalBlocks
from kv_transfer.store import block_array
from kv_transfer.transport import PeerLost, Run, in_time, settled

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


@dataclass(slots=True, eq=False)
class _Link:
    """A cached peer, and the pulls that use it."""

    address: str
    peer: asyncio.Task[Peer]
    watched: dict[bytes, asyncio.Future[None]]  # lease -> fails when the lease or peer is gone
    renewing: asyncio.Task[None] | None = None
    time_to_live: float = 30.0
    users: int = 0
    used_at: float = field(default_factory=time.monotonic)
    stale: bool = False


class PullConsumer:
    """Consumer over a BlockStore.

    `timeout` is the longest silence of a producer in seconds; each step (connect, one slice of
    bytes, release) must end within it. Bytes move in slices of at most `slice_bytes` (one block
    at least), and at most `max_inflight_bytes` are under way at once.
    """

    def __init__(
        self,
        store: BlockStore,
        layout: KvLayout,
        dialer: Dialer,
        *,
        timeout: float = 20.0,
        slice_bytes: int = 16 * 2**20,
        max_inflight_bytes: int = 256 * 2**20,
    ) -> None:
        if store.block_bytes != layout.block_bytes:
            raise ValueError(f"blocks of {store.block_bytes} bytes, layout {layout.block_bytes}")
        self._store = store
        self._layout = layout
        self._dialer = dialer
        self._timeout = timeout
        self._slice = max(1, slice_bytes // store.block_bytes)  # blocks
        slices = max(1, max_inflight_bytes // (self._slice * store.block_bytes))
        self._places = asyncio.Semaphore(slices)
        self._links: dict[str, _Link] = {}
        self._background: set[asyncio.Task[None]] = set()

    async def pull(self, ref: KvRef, into: Sequence[int]) -> PullReport:
        """Copy the blocks of `ref` into the local blocks `into`; see contract.Consumer."""
        started = time.monotonic()
        self._check(ref, into)
        link = await self._link(ref)
        try:
            peer = link.peer.result()
            await self._guarded(link, peer, ref, into)
            seconds = time.monotonic() - started
            return PullReport(peer.transport, len(into) * self._store.block_bytes, seconds)
        except PeerLost:
            self._forget(link)
            raise
        finally:
            self._leave(link)

    async def close(self) -> None:
        """Disconnect from every producer. Ends no pull: cancel those first."""
        for link in list(self._links.values()):
            self._forget(link)
        await asyncio.gather(*self._background, return_exceptions=True)

    def _check(self, ref: KvRef, into: Sequence[int]) -> None:
        if ref.layout_digest != self._layout.digest:
            raise KvTransferError("KV layouts differ")
        if len(into) != ref.blocks or len(set(into)) != len(into):
            raise KvTransferError(f"{ref.blocks} blocks leased, {len(set(into))} to put them")
        if not all(0 <= block < self._store.blocks for block in into):
            raise ValueError("pull into blocks that do not exist")

    async def _guarded(self, link: _Link, peer: Peer, ref: KvRef, into: Sequence[int]) -> None:
        """Transfer while the lease is renewed; whatever ends it, the targets are quiet."""
        gone = self._watch(link, peer, ref)
        transfer = asyncio.create_task(self._transfer(peer, ref, into))
        try:
            await asyncio.wait({transfer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not transfer.done():
                gone.result()  # raises
            transfer.result()
        except BaseException:
            transfer.cancel()
            try:
                await settled(transfer)
            finally:
                link.users += 1
                self._spawn(self._give_up(link, peer, ref.lease_id))
            raise
        finally:
            self._unwatch(link, ref.lease_id)

    async def _transfer(self, peer: Peer, ref: KvRef, into: Sequence[int]) -> None:
        """Follow, read, verify, commit. Raises KvTransferError."""
        landed = 0
        async with contextlib.aclosing(peer.follow(ref.lease_id)) as news:
            async for final in news:
                if final.first != landed or landed + len(final.blocks) > ref.blocks:
                    raise KvTransferError("the producer named blocks out of order")
                if not all(0 <= block < peer.pool_blocks for block in final.blocks):
                    raise KvTransferError("the producer named a block outside its pool")
                await self._read(peer, ref, final, into)
                landed += len(final.blocks)
                if final.sealed:
                    break
        if landed != ref.blocks:
            raise KvTransferError(f"{landed} of {ref.blocks} blocks when the producer ended")
        release = peer.release(ref.lease_id, committed=True)
        if not await in_time(release, self._timeout, "release"):
            raise KvTransferError("lease was gone before the copy was complete")

    async def _read(self, peer: Peer, ref: KvRef, final: FinalBlocks, into: Sequence[int]) -> None:
        """Read and verify one message's blocks, slice by slice."""
        for start in range(0, len(final.blocks), self._slice):
            stop = start + self._slice
            sources, digests = final.blocks[start:stop], final.digests[start:stop]
            first = final.first + start
            targets = [block_array(self._store, i) for i in into[first : first + len(sources)]]
            run = Run(ref.lease_id, first, sources, targets, digests)
            async with self._places:
                await in_time(peer.read(run), self._timeout, "reading blocks")
            if run.landed != len(sources):
                raise KvTransferError("blocks are missing")

    # Peers.

    async def _link(self, ref: KvRef) -> _Link:
        """The link to the incarnation that granted `ref`, with one more user. Raises
        KvTransferError."""
        link = self._links.get(ref.control_address)
        if link is not None and link.peer.done() and not _is(link.peer, ref.engine_id):
            self._forget(link)
            link = None
        if link is None:
            self._forget_idle()
            dialing = asyncio.create_task(self._dial(ref.control_address))
            link = _Link(ref.control_address, dialing, {})
            self._links[ref.control_address] = link
        link.users += 1
        try:
            peer = await asyncio.shield(link.peer)
            if peer.engine_id != ref.engine_id:
                raise PeerLost(
                    f"producer at {ref.control_address} restarted: it is {peer.engine_id}, "
                    f"the lease is from {ref.engine_id}"
                )
        except BaseException as error:
            if isinstance(error, KvTransferError):
                self._forget(link)
            self._leave(link)
            raise
        return link

    async def _dial(self, address: str) -> Peer:
        return await in_time(self._dialer.dial(address), self._timeout, "connecting")

    def _leave(self, link: _Link) -> None:
        """One user less."""
        link.users -= 1
        link.used_at = time.monotonic()
        if link.stale and link.users == 0:
            self._spawn(_hang_up(link.peer))

    def _forget(self, link: _Link) -> None:
        """Use the link for no new pull; disconnect when the last one has ended."""
        if self._links.get(link.address) is link:
            del self._links[link.address]
        if not link.stale:
            link.stale = True
            if link.users == 0:
                self._spawn(_hang_up(link.peer))

    def _forget_idle(self) -> None:
        """Disconnect from producers that have not been used for long; most are gone."""
        for link in list(self._links.values()):
            if link.users == 0 and time.monotonic() - link.used_at > _IDLE_SECONDS:
                self._forget(link)

    async def _give_up(self, link: _Link, peer: Peer, lease_id: bytes) -> None:
        """Let the producer free the blocks now rather than when the lease expires."""
        try:
            await in_time(peer.release(lease_id, committed=False), _GIVE_UP_SECONDS, "release")
        except KvTransferError as error:
            log.debug("lease %s left to expire: %s", lease_id.hex(), error)
        finally:
            self._leave(link)

    # Renewals, batched per peer.

    def _watch(self, link: _Link, peer: Peer, ref: KvRef) -> asyncio.Future[None]:
        """Renew the lease from now on; the future fails when the lease or the peer is gone."""
        if ref.lease_id in link.watched:
            raise KvTransferError("this lease is being pulled already")
        gone = asyncio.get_running_loop().create_future()
        link.watched[ref.lease_id] = gone
        link.time_to_live = ref.time_to_live
        if link.renewing is None:
            link.renewing = asyncio.create_task(self._renew_forever(link, peer))
        return gone

    def _unwatch(self, link: _Link, lease_id: bytes) -> None:
        gone = link.watched.pop(lease_id)
        if gone.done():
            gone.exception()  # seen
        if not link.watched and link.renewing is not None:
            link.renewing.cancel()
            link.renewing = None

    async def _renew_forever(self, link: _Link, peer: Peer) -> None:
        """Every sixth of the time to live, or more often to notice a silent peer in time."""
        heard = time.monotonic()
        while True:
            interval = max(_SHORTEST_RENEWAL, min(link.time_to_live / 6, self._timeout / 4))
            await asyncio.sleep(interval)
            leases = list(link.watched)
            try:
                lives = await in_time(peer.renew(leases), self._timeout / 2, "renewal")
                heard = time.monotonic()
                ended = [i for i, left in zip(leases, lives, strict=True) if left <= 0]
                error = KvTransferError("lease expired or was taken back")
            except KvTransferError as failure:
                if time.monotonic() - heard < self._timeout - interval:
                    continue
                ended, error = leases, PeerLost(f"producer is silent: {failure}")
            for lease_id in ended:
                gone = link.watched.get(lease_id)
                if gone is not None and not gone.done():
                    gone.set_exception(error)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _is(peer: asyncio.Task[Peer], engine_id: str) -> bool:
    failed = peer.cancelled() or peer.exception() is not None
    return not failed and peer.result().engine_id == engine_id


async def _hang_up(peer: asyncio.Task[Peer]) -> None:
    with contextlib.suppress(KvTransferError):
        await (await peer).close()
