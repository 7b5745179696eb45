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
import time
from collections.abc import Sequence

from baton.errors import KvTransferError
from baton.types import KvRef
from kv_transfer.contract import BlockStore, KvLayout, PullReport
from kv_transfer.links import Dialer, Hold, Links, Peer
from kv_transfer.producer import FinalBlocks
from kv_transfer.store import block_array
from kv_transfer.transport import Run, in_time, settled


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
        self._timeout = timeout
        self._slice = max(1, slice_bytes // store.block_bytes)  # blocks
        slices = max(1, max_inflight_bytes // (self._slice * store.block_bytes))
        self._places = asyncio.Semaphore(slices)
        self._links = Links(dialer, timeout)

    async def pull(self, ref: KvRef, into: Sequence[int], skip: int = 0) -> PullReport:
        """Copy the blocks of `ref` after the first `skip` into the local blocks `into`; see
        contract.Consumer."""
        started = time.monotonic()
        self._check(ref, into, skip)
        async with self._links.hold(ref) as hold:
            await self._guarded(hold, ref, into, skip)
            seconds = time.monotonic() - started
            return PullReport(hold.peer.transport, len(into) * self._store.block_bytes, seconds)

    async def close(self) -> None:
        """Disconnect from every producer. Ends no pull: cancel those first."""
        await self._links.close()

    def _check(self, ref: KvRef, into: Sequence[int], skip: int) -> None:
        if ref.layout_digest != self._layout.digest:
            raise KvTransferError("KV layouts differ")
        if not 0 <= skip < ref.blocks:
            raise KvTransferError(f"{ref.blocks} blocks leased, {skip} of them not wanted")
        if skip + len(into) != ref.blocks or len(set(into)) != len(into):
            raise KvTransferError(
                f"{ref.blocks} blocks leased, {len(set(into))} to put them from {skip} on"
            )
        if not all(0 <= block < self._store.blocks for block in into):
            raise ValueError("pull into blocks that do not exist")

    async def _guarded(self, hold: Hold, ref: KvRef, into: Sequence[int], skip: int) -> None:
        """Transfer while the lease is held; whatever ends it, the targets are quiet."""
        transfer = asyncio.create_task(self._transfer(hold.peer, ref, into, skip))
        try:
            await asyncio.wait({transfer, hold.gone}, return_when=asyncio.FIRST_COMPLETED)
            if not transfer.done():
                hold.gone.result()  # raises
            transfer.result()
        finally:
            transfer.cancel()
            await settled(transfer)

    async def _transfer(self, peer: Peer, ref: KvRef, into: Sequence[int], skip: int) -> None:
        """Follow, read, verify, commit. Raises KvTransferError."""
        landed = 0
        async with contextlib.aclosing(peer.follow(ref.lease_id)) as news:
            async for final in news:
                if final.first != landed or landed + len(final.blocks) > ref.blocks:
                    raise KvTransferError("the producer named blocks out of order")
                if not all(0 <= block < peer.pool_blocks for block in final.blocks):
                    raise KvTransferError("the producer named a block outside its pool")
                await self._read(peer, ref, final, into, skip)
                landed += len(final.blocks)
                if final.sealed:
                    break
        if landed != ref.blocks:
            raise KvTransferError(f"{landed} of {ref.blocks} blocks when the producer ended")
        release = peer.release(ref.lease_id, committed=True)
        if not await in_time(release, self._timeout, "release"):
            raise KvTransferError("lease was gone before the copy was complete")

    async def _read(
        self, peer: Peer, ref: KvRef, final: FinalBlocks, into: Sequence[int], skip: int
    ) -> None:
        """Read and verify one message's blocks, slice by slice, from position `skip` on."""
        for start in range(max(0, skip - final.first), len(final.blocks), self._slice):
            stop = start + self._slice
            sources, digests = final.blocks[start:stop], final.digests[start:stop]
            first = final.first + start
            wanted = into[first - skip : first - skip + len(sources)]
            targets = [block_array(self._store, i) for i in wanted]
            run = Run(ref.lease_id, first, sources, targets, digests, wanted)
            async with self._places:
                await in_time(peer.read(run), self._timeout, "reading blocks")
            if run.landed != len(sources):
                raise KvTransferError("blocks are missing")
