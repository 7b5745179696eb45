"""The hand-off within one process, for tests of both workers: real leases, real digests, no I/O.

    network = Network()
    producer = LeaseProducer(store, layout, control_address="prefill-0", on_freed=...)
    network.attach(producer, store)
    consumer = PullConsumer(other_store, layout, network.dialer(layout.digest))

`Network.faults` says what goes wrong; everything is right by default.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from baton.errors import KvTransferError
from kv_transfer.contract import BlockStore
from kv_transfer.producer import PROTOCOL_VERSION, FinalBlocks, LeaseProducer
from kv_transfer.store import Bytes, block_array
from kv_transfer.transport import PeerLost, Run, quiet


@dataclass(slots=True)
class Faults:
    """What the transport does wrong from now on. Positions are block indices in the lease."""

    delay: float = 0.0  # seconds before each run of blocks
    late: float = 0.0  # seconds for which a run goes on writing after it was told to stop
    flip_bit_of: set[int] = field(default_factory=set)
    truncate: set[int] = field(default_factory=set)  # only the first half arrives
    drop: set[int] = field(default_factory=set)  # never arrives: the read hangs
    swap: tuple[int, int] | None = None  # two positions arrive in each other's place
    die_before: int | None = None  # the connection breaks before this position
    frozen: bool = False  # nothing is answered any more
    lose_release: bool = False  # the producer acts on Release; its answer is lost
    duplicate: bool = False  # each control call arrives twice


class Network:
    """Producers of this process by their control address."""

    def __init__(self) -> None:
        self.faults = Faults()
        self._engines: dict[str, tuple[LeaseProducer, BlockStore]] = {}

    def attach(self, producer: LeaseProducer, store: BlockStore) -> None:
        """Let consumers find `producer`, whose blocks are in `store`. One that was attached under
        the same address before counts as restarted."""
        self._engines[producer.control_address] = (producer, store)

    def detach(self, control_address: str) -> None:
        """The producer there is dead."""
        self._engines.pop(control_address, None)

    def engine(self, control_address: str) -> tuple[LeaseProducer, BlockStore]:
        """Who is there. Raises PeerLost."""
        try:
            return self._engines[control_address]
        except KeyError:
            raise PeerLost(f"no producer at {control_address}") from None

    def dialer(self, layout_digest: str) -> MemoryDialer:
        """For a PullConsumer of this process."""
        return MemoryDialer(self, layout_digest)


class MemoryDialer:
    """Connects to the producers of a Network."""

    def __init__(self, network: Network, layout_digest: str) -> None:
        self._network = network
        self._layout_digest = layout_digest

    async def dial(self, control_address: str) -> MemoryPeer:
        """Connect to whoever is there. Raises KvTransferError."""
        producer, _ = self._network.engine(control_address)
        engine = producer.connect(PROTOCOL_VERSION, self._layout_digest, "")
        return MemoryPeer(self._network, control_address, engine.engine_id, engine.pool_blocks)


class MemoryPeer:
    """A connected producer; see links.Peer."""

    transport = "memory"

    def __init__(self, network: Network, address: str, engine_id: str, pool_blocks: int) -> None:
        self.engine_id = engine_id
        self.pool_blocks = pool_blocks
        self._network = network
        self._address = address

    async def follow(self, lease_id: bytes) -> AsyncGenerator[FinalBlocks, None]:
        """News of a lease until its seal."""
        producer = await self._producer()
        async with contextlib.aclosing(producer.follow(lease_id)) as news:
            async for final in news:
                await self._producer()
                yield final

    async def renew(self, lease_ids: Sequence[bytes]) -> list[float]:
        """Times to live in seconds, 0 for leases that are gone."""
        producer = await self._producer()
        if self._network.faults.duplicate:
            for lease_id in lease_ids:
                producer.renew(lease_id)
        return [producer.renew(lease_id) for lease_id in lease_ids]

    async def release(self, lease_id: bytes, *, committed: bool) -> bool:
        """Whether the copy is valid."""
        producer = await self._producer()
        valid = producer.release(lease_id, committed=committed)
        if self._network.faults.duplicate:
            valid = producer.release(lease_id, committed=committed)
        if self._network.faults.lose_release:
            raise PeerLost("the answer was lost")
        return valid

    async def read(self, run: Run) -> None:
        """Fill and land every target, as the faults allow."""
        await self._producer()
        work = asyncio.ensure_future(self._fill(run))
        await quiet(work, run.stop)

    async def close(self) -> None:
        """Nothing to let go of."""

    async def _producer(self) -> LeaseProducer:
        if self._network.faults.frozen:
            await asyncio.get_running_loop().create_future()
        producer, _ = self._network.engine(self._address)
        if producer.engine_id != self.engine_id:
            raise PeerLost("the producer restarted")
        return producer

    async def _fill(self, run: Run) -> None:
        """Like a thread of a real transport: only `run.stopped` ends it, and only between
        blocks."""
        faults = self._network.faults
        await self._wait(run, faults.delay)
        for index, target in enumerate(run.targets):
            position = run.first + index
            if position == faults.die_before:
                raise PeerLost("connection broke")
            if position in faults.drop:
                await self._wait(run, float("inf"))
            self._arrive(run, index, target)
            if run.stopped:
                await self._write_late(run, target)
            run.land(index)
            await asyncio.sleep(0)

    def _arrive(self, run: Run, index: int, target: Bytes) -> None:
        faults = self._network.faults
        position, source = run.first + index, index
        if faults.swap is not None and position in faults.swap:
            source = sum(faults.swap) - position - run.first
        _, store = self._network.engine(self._address)
        if not 0 <= run.sources[source] < store.blocks:
            raise KvTransferError("block outside the pool")
        block = block_array(store, run.sources[source])
        size = len(block) // 2 if position in faults.truncate else len(block)
        target[:size] = block[:size]
        if position in faults.flip_bit_of:
            target[position % len(target)] ^= 1

    async def _write_late(self, run: Run, target: Bytes) -> None:
        """Writes that were under way when the run was told to stop."""
        end = asyncio.get_running_loop().time() + self._network.faults.late
        while asyncio.get_running_loop().time() < end:
            target[:] += 1
            await asyncio.sleep(0.005)

    async def _wait(self, run: Run, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        for _ in iter(lambda: loop.time() < end and not run.stopped, False):
            await asyncio.sleep(0.005)
