"""The producer: leases over the pool's blocks, their digests, a timer, and the data servers.

Everything runs on the event loop except digests of many bytes and what the data servers send. A
pool on a device is digested there. Its blocks are brought to host memory, and digested there, too,
for a lease that somebody follows who copies from there, and for no other.

Control calls arrive here from channel.py (gRPC) or memory.py (same process); both see the same
four verbs: connect, follow, renew, release.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from baton.errors import KvTransferError
from baton.types import KvRef
from kv_transfer.contract import BlockStore, KvLayout, OnFreed
from kv_transfer.device import TRANSPORT as DEVICE_TRANSPORT
from kv_transfer.device import DeviceServer, SourcePool
from kv_transfer.digest import DigestKind, block_digest
from kv_transfer.lease import Lease, LeaseState, LeaseTable
from kv_transfer.local import host_id
from kv_transfer.shm import SharedPool, ShmServer
from kv_transfer.tcp import TcpServer
from kv_transfer.transport import INLINE_BYTES, DataEndpoint

log = logging.getLogger(__name__)

PROTOCOL_VERSION = 1
_MAX_BLOCKS_PER_MESSAGE = 4096


@dataclass(frozen=True, slots=True)
class FinalBlocks:
    """News of a lease: positions [first, first + len(blocks)) are final. `sealed` ends it."""

    first: int
    blocks: tuple[int, ...]  # the producer's block numbers
    digests: tuple[int, ...]
    sealed: bool


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What a consumer learns when it connects."""

    engine_id: str
    endpoints: tuple[DataEndpoint, ...]
    block_bytes: int
    pool_blocks: int


@dataclass(slots=True)
class _Digests:
    """Of a lease's blocks, as far as they are taken. A block with one can be read where its kind
    says."""

    taken: list[int]
    busy: bool = False  # more are being taken


@dataclass(slots=True)
class _Filling:
    """A live lease that is being filled, or read."""

    digests: dict[DigestKind, _Digests]  # those that somebody wants
    ready: int = 0  # blocks that prefill declared final
    seal: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class LeaseProducer:
    """Producer over a BlockStore.

    `control_address` is where consumers reach the KvService of this process. `shared` is the
    memory that `store` lies in, if it may be mapped by others. `data_address` (host:port) turns
    on TCP; one that means every interface is advertised under the control address's host.
    `device` is the pool itself where that is not in host memory: `store` is its twin then.
    `max_leased_blocks` bounds what leases hold. `on_freed` is called on the event loop, never
    from inside a method of this class.
    """

    def __init__(
        self,
        store: BlockStore,
        layout: KvLayout,
        *,
        control_address: str,
        on_freed: OnFreed,
        shared: SharedPool | None = None,
        device: SourcePool | None = None,
        data_address: str = "",
        time_to_live: float = 30.0,
        max_age: float = 600.0,
        max_leased_blocks: int | None = None,
        stall: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if store.block_bytes != layout.block_bytes:
            raise ValueError(f"blocks of {store.block_bytes} bytes, layout {layout.block_bytes}")
        if shared is not None and not shared.holds(store):
            raise ValueError("the blocks do not lie end to end in the shared memory")
        self.engine_id = secrets.token_hex(16)
        self.control_address = control_address
        self._store = store
        self._layout = layout
        self._on_freed = on_freed
        self._clock = clock
        limit = store.blocks if max_leased_blocks is None else max_leased_blocks
        self._table = LeaseTable(time_to_live=time_to_live, max_age=max_age, max_blocks=limit)
        self._filling: dict[bytes, _Filling] = {}
        self._threads = ThreadPoolExecutor(1, "kv-digest")
        self._digesting: set[asyncio.Future[list[int]]] = set()
        self._pool = device
        self._kind = DigestKind.XXH3 if device is None else DigestKind.DEVICE  # that makes final
        self._device = DeviceServer(device, self.engine_id) if device is not None else None
        self._shm = ShmServer(shared, self.engine_id) if shared is not None else None
        self._tcp = self._tcp_server(data_address, stall) if data_address else None
        self._timer: asyncio.Task[None] | None = None

    @property
    def leased_blocks(self) -> int:
        """Blocks that may not be reused yet."""
        return self._table.held_blocks

    @property
    def live_leases(self) -> int:
        """Leases that have not ended."""
        return self._table.live

    async def start(self) -> None:
        """Open the data servers and start the timer."""
        for server in (self._device, self._shm, self._tcp):
            if server is not None:
                server.start()
        self._timer = asyncio.create_task(self._sweep_forever())

    async def close(self) -> None:
        """Revoke every lease, free their blocks, close the data servers."""
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.gather(self._timer, return_exceptions=True)
        for lease_id in list(self._filling):
            self.revoke(lease_id)
        for server in (self._device, self._shm, self._tcp):
            if server is not None:
                await server.close()
        await asyncio.gather(*self._digesting, return_exceptions=True)
        self._threads.shutdown()

    # Called by the prefill worker; see contract.Producer.

    def publish(self, blocks: Sequence[int], tokens: int) -> KvRef:
        """Grant a lease over `blocks`; see contract.Producer."""
        if not blocks or not all(0 <= block < self._store.blocks for block in blocks):
            raise ValueError("a lease needs blocks of the pool")
        lease = self._table.grant(blocks, self._clock())
        self._filling[lease.id] = _Filling({self._kind: _Digests(lease.digests)})
        return KvRef(
            lease_id=lease.id,
            control_address=self.control_address,
            engine_id=self.engine_id,
            layout_digest=self._layout.digest,
            blocks=len(lease.blocks),
            tokens=tokens,
            time_to_live=self._table.time_to_live,
        )

    def advance(self, lease_id: bytes, ready: int) -> None:
        """The first `ready` blocks are final; see contract.Producer."""
        lease, filling = self._table.find(lease_id), self._filling.get(lease_id)
        if lease is None or filling is None:
            return
        if ready > len(lease.blocks):
            raise ValueError(f"{ready} blocks ready of {len(lease.blocks)}")
        filling.ready = max(filling.ready, ready)
        self._digest(lease, filling)

    def seal(self, lease_id: bytes) -> None:
        """Every block is final; see contract.Producer."""
        lease, filling = self._table.find(lease_id), self._filling.get(lease_id)
        if lease is None or filling is None:
            return
        filling.ready, filling.seal = len(lease.blocks), True
        self._digest(lease, filling)

    def revoke(self, lease_id: bytes) -> None:
        """End the lease; see contract.Producer."""
        self._table.revoke(lease_id, self._clock())
        self._settle()

    # Called for consumers, by channel.py and memory.py.

    def connect(self, version: int, layout_digest: str, consumer_host: str) -> EngineDescription:
        """Check that the consumer understands these blocks and tell it where they are. Raises
        KvTransferError."""
        if version != PROTOCOL_VERSION:
            raise KvTransferError(f"hand-off protocol {PROTOCOL_VERSION}, consumer has {version}")
        if layout_digest != self._layout.digest:
            raise KvTransferError("KV layouts differ")
        endpoints = []
        local = consumer_host == host_id()
        for name, server in ((DEVICE_TRANSPORT, self._device), ("shm", self._shm)):
            if server is not None and local:
                endpoints.append(DataEndpoint(name, server.address, server.issue_token()))
        if self._tcp is not None:
            endpoints.append(DataEndpoint("tcp", self._tcp.address, self._tcp.issue_token()))
        return EngineDescription(
            self.engine_id, tuple(endpoints), self._store.block_bytes, self._store.blocks
        )

    async def follow(
        self, lease_id: bytes, kind: DigestKind = DigestKind.XXH3
    ) -> AsyncGenerator[FinalBlocks, None]:
        """News until the seal, from the first block on, with digests of this kind. Following
        renews once. Raises KvTransferError when the lease ends otherwise, or is unknown, or there
        are no such digests here."""
        self._table.renew(lease_id, self._clock())
        told, sealed = 0, False
        while not sealed:
            lease = self._table.find(lease_id)
            if lease is None:
                raise KvTransferError("lease is unknown")
            if not lease.live:
                raise KvTransferError(f"lease is {lease.state.name.lower()}")
            filling = self._filling[lease_id]
            taken = self._wanted(lease, filling, kind).taken
            if not lease.live:  # its time is up
                continue
            upto = min(len(taken), told + _MAX_BLOCKS_PER_MESSAGE)
            sealed = lease.state is LeaseState.SEALED and upto == len(lease.blocks)
            if told == upto and not sealed:
                filling.changed.clear()
                await filling.changed.wait()
                continue
            blocks, digests = lease.blocks[told:upto], tuple(taken[told:upto])
            yield FinalBlocks(told, blocks, digests, sealed)
            told = upto

    def renew(self, lease_id: bytes) -> float:
        """Extend a lease; its time to live in seconds, 0 when it is gone."""
        left = self._table.renew(lease_id, self._clock())
        self._settle()
        return left

    def release(self, lease_id: bytes, *, committed: bool) -> bool:
        """The consumer is done with it; whether its copy is valid."""
        valid = self._table.release(lease_id, committed=committed, now=self._clock())
        self._settle()
        return valid

    def begin_read(self, lease_id: bytes, first: int, count: int) -> Sequence[int]:
        """The block numbers of positions that are final, and in host memory, counted as being
        read; see lease.LeaseTable."""
        filling = self._filling.get(lease_id)
        here = filling.digests.get(DigestKind.XXH3) if filling else None
        if filling and first + count > (len(here.taken) if here else 0):
            raise KvTransferError(f"blocks {first}+{count} of the lease are not in host memory")
        try:
            return self._table.begin_read(lease_id, first, count, self._clock())
        finally:
            self._settle()

    def end_read(self, lease_id: bytes) -> None:
        """They are read no more."""
        self._table.end_read(lease_id)
        self._settle()

    # Digests and the timer.

    def _wanted(self, lease: Lease, filling: _Filling, kind: DigestKind) -> _Digests:
        """The digests of this kind; from now on they are taken."""
        if kind not in filling.digests:
            if self._pool is None:
                raise KvTransferError("the blocks are not on a device")
            filling.digests[kind] = _Digests([])
            self._take(lease, filling, kind)
        return filling.digests[kind]

    def _digest(self, lease: Lease, filling: _Filling) -> None:
        """Digest what is ready and has not been, in every kind that is wanted."""
        for kind in filling.digests:
            self._take(lease, filling, kind)

    def _take(self, lease: Lease, filling: _Filling, kind: DigestKind) -> None:
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
            self._digesting.add(work)
            work.add_done_callback(lambda done: self._digested(lease, filling, kind, done))

    def _digested(
        self, lease: Lease, filling: _Filling, kind: DigestKind, work: asyncio.Future[list[int]]
    ) -> None:
        filling.digests[kind].busy = False
        self._digesting.discard(work)
        self._table.end_read(lease.id)
        if work.cancelled() or work.exception() is not None:
            log.error("digests of a lease failed; it is revoked", exc_info=work.exception())
            self._table.revoke(lease.id, self._clock())
            self._settle()
            return
        self._taken(lease, filling, kind, work.result())
        if len(filling.digests[kind].taken) < filling.ready:
            self._take(lease, filling, kind)

    def _taken(self, lease: Lease, filling: _Filling, kind: DigestKind, digests: list[int]) -> None:
        now = self._clock()
        if kind is not self._kind:
            filling.digests[kind].taken += digests
        elif digests:
            self._table.finalize(lease.id, digests, now)
        if filling.seal and len(lease.digests) == len(lease.blocks):
            self._table.seal(lease.id, now)
        filling.changed.set()
        self._settle()

    def _tcp_server(self, address: str, stall: float) -> TcpServer:
        everywhere = address.rpartition(":")[0] in ("0.0.0.0", "[::]")  # noqa: S104  # compared
        host = self.control_address.rpartition(":")[0] if everywhere else ""
        return TcpServer(self, self._store, address, stall=stall, advertised_host=host)

    def _digests(self, kind: DigestKind, blocks: Sequence[int], first: int) -> list[int]:
        if self._pool is not None:
            if kind is DigestKind.DEVICE:
                return self._pool.digests(blocks, first)
            self._pool.save(blocks)
        return [block_digest(self._store.block(block), first + i) for i, block in enumerate(blocks)]

    async def _sweep_forever(self) -> None:
        interval = min(1.0, self._table.time_to_live / 10)
        while True:
            await asyncio.sleep(interval)
            self._table.sweep(self._clock())
            self._settle()

    def _settle(self) -> None:
        """Tell whom it concerns of leases that ended or became free."""
        for lease_id, filling in list(self._filling.items()):
            lease = self._table.find(lease_id)
            if lease is None or not lease.live:
                del self._filling[lease_id]
                filling.changed.set()
                if self._tcp is not None and lease and lease.state is not LeaseState.RELEASED:
                    self._tcp.stop_sending(lease_id)
        for lease_id in self._table.take_freed():
            asyncio.get_running_loop().call_soon(self._on_freed, lease_id)
