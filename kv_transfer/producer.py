"""The producer: leases over the pool's blocks, a timer, and the data servers.

Everything runs on the event loop except digests of many bytes (digester.py) and what the data
servers send. Control calls arrive here from channel.py (gRPC) or memory.py (same process); both see
the same four verbs: connect, follow, renew, release.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from baton.errors import KvTransferError
from baton.types import KvRef
from kv_transfer.contract import BlockStore, KvLayout, OnFreed
from kv_transfer.device import TRANSPORT as DEVICE_TRANSPORT
from kv_transfer.device import DeviceServer, SourcePool
from kv_transfer.digest import DigestKind
from kv_transfer.digester import Digester, Filling
from kv_transfer.lease import LeaseState, LeaseTable
from kv_transfer.local import host_id
from kv_transfer.shm import SharedPool, ShmServer
from kv_transfer.tcp import TcpServer
from kv_transfer.transport import DataEndpoint

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
        self._filling: dict[bytes, Filling] = {}
        self._digester = Digester(self._table, store, device, clock, self._settle)
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
        await self._digester.close()

    # Called by the prefill worker; see contract.Producer.

    def publish(self, blocks: Sequence[int], tokens: int) -> KvRef:
        """Grant a lease over `blocks`; see contract.Producer."""
        if not blocks or not all(0 <= block < self._store.blocks for block in blocks):
            raise ValueError("a lease needs blocks of the pool")
        lease = self._table.grant(blocks, self._clock())
        self._filling[lease.id] = self._digester.begin(lease)
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
        self._digester.digest(lease, filling)

    def seal(self, lease_id: bytes) -> None:
        """Every block is final; see contract.Producer."""
        lease, filling = self._table.find(lease_id), self._filling.get(lease_id)
        if lease is None or filling is None:
            return
        filling.ready, filling.seal = len(lease.blocks), True
        self._digester.digest(lease, filling)

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
            taken = self._digester.wanted(lease, filling, kind)
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
        if filling is not None and first + count > filling.taken(DigestKind.XXH3):
            raise KvTransferError(f"blocks {first}+{count} of the lease are not in host memory")
        try:
            return self._table.begin_read(lease_id, first, count, self._clock())
        finally:
            self._settle()

    def end_read(self, lease_id: bytes) -> None:
        """They are read no more."""
        self._table.end_read(lease_id)
        self._settle()

    # The servers and the timer.

    def _tcp_server(self, address: str, stall: float) -> TcpServer:
        everywhere = address.rpartition(":")[0] in ("0.0.0.0", "[::]")  # noqa: S104  # compared
        host = self.control_address.rpartition(":")[0] if everywhere else ""
        return TcpServer(self, self._store, address, stall=stall, advertised_host=host)

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
