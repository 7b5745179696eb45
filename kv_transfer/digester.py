"""Digests of a producer's blocks, taken as they become ready.

Whose pool is in host memory has digests of one kind, by xxh3. A pool on a device is digested there.
Its blocks are brought to host memory, and digested there, too, for a lease that somebody follows
who copies from there, and for no other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from baton.errors import KvTransferError
from kv_transfer.contract import BlockStore
from kv_transfer.device import SourcePool
from kv_transfer.digest import DigestKind, block_digest
from kv_transfer.lease import Lease, LeaseTable
from kv_transfer.transport import INLINE_BYTES

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Digests:
    """Of a lease's blocks, as far as they are taken. A block with one can be read where its kind
    says."""

    taken: list[int]
    busy: bool = False  # more are being taken


@dataclass(slots=True)
class Filling:
    """A live lease that is being filled, or read."""

    digests: dict[DigestKind, _Digests]  # those that somebody wants
    ready: int = 0  # blocks that prefill declared final
    seal: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def taken(self, kind: DigestKind) -> int:
        """How many blocks have digests of this kind."""
        return len(self.digests[kind].taken) if kind in self.digests else 0


class Digester:
    """Digests what leases of `table` hold, on the event loop or in a thread, and finalizes and
    seals them. `store` has the blocks in host memory, once they are saved if `pool` is where they
    are computed. `settle` is called when leases may have ended, or blocks become free."""

    def __init__(
        self,
        table: LeaseTable,
        store: BlockStore,
        pool: SourcePool | None,
        clock: Callable[[], float],
        settle: Callable[[], None],
    ) -> None:
        self._table, self._store, self._pool = table, store, pool
        self._clock, self._settle = clock, settle
        self._kind = DigestKind.XXH3 if pool is None else DigestKind.DEVICE  # that makes final
        self._threads = ThreadPoolExecutor(1, "kv-digest")
        self._working: set[asyncio.Future[list[int]]] = set()

    def begin(self, lease: Lease) -> Filling:
        """For a lease that has been granted."""
        return Filling({self._kind: _Digests(lease.digests)})

    def wanted(self, lease: Lease, filling: Filling, kind: DigestKind) -> Sequence[int]:
        """The digests of this kind; from now on they are taken, and this grows. Raises
        KvTransferError if there can be none."""
        if kind not in filling.digests:
            if self._pool is None:
                raise KvTransferError("the blocks are not on a device")
            filling.digests[kind] = _Digests([])
            self._take(lease, filling, kind)
        return filling.digests[kind].taken

    def digest(self, lease: Lease, filling: Filling) -> None:
        """Digest what is ready and has not been, in every kind that is wanted."""
        for kind in filling.digests:
            self._take(lease, filling, kind)

    async def close(self) -> None:
        """Wait for what is being digested, and end the thread."""
        await asyncio.gather(*self._working, return_exceptions=True)
        self._threads.shutdown()

    def _take(self, lease: Lease, filling: Filling, kind: DigestKind) -> None:
        """In one kind, here or in the thread, one piece at a time."""
        digests = filling.digests[kind]
        if digests.busy:
            return
        first = len(digests.taken)
        blocks = self._table.begin_digest(lease.id, first, filling.ready, self._clock())
        if not blocks:
            self._taken(lease, filling, kind, [])
        elif self._pool is None and len(blocks) * self._store.block_bytes <= INLINE_BYTES:
            found = self._digests(kind, blocks, first)
            self._table.end_read(lease.id)
            self._taken(lease, filling, kind, found)
        else:
            digests.busy = True
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._threads, self._digests, kind, blocks, first)
            self._working.add(work)
            work.add_done_callback(lambda done: self._done(lease, filling, kind, done))

    def _done(
        self, lease: Lease, filling: Filling, kind: DigestKind, work: asyncio.Future[list[int]]
    ) -> None:
        filling.digests[kind].busy = False
        self._working.discard(work)
        self._table.end_read(lease.id)
        if work.cancelled() or work.exception() is not None:
            log.error("digests of a lease failed; it is revoked", exc_info=work.exception())
            self._table.revoke(lease.id, self._clock())
            self._settle()
            return
        self._taken(lease, filling, kind, work.result())
        if filling.taken(kind) < filling.ready:
            self._take(lease, filling, kind)

    def _taken(self, lease: Lease, filling: Filling, kind: DigestKind, found: list[int]) -> None:
        now = self._clock()
        if kind is not self._kind:
            filling.digests[kind].taken += found
        elif found:
            self._table.finalize(lease.id, found, now)
        if filling.seal and len(lease.digests) == len(lease.blocks):
            self._table.seal(lease.id, now)
        filling.changed.set()
        self._settle()

    def _digests(self, kind: DigestKind, blocks: Sequence[int], first: int) -> list[int]:
        if self._pool is not None:
            if kind is DigestKind.DEVICE:
                return self._pool.digests(blocks, first)
            self._pool.save(blocks)
        return [block_digest(self._store.block(block), first + i) for i, block in enumerate(blocks)]
