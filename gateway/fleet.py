"""The live workers, as the registry and their streams tell."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc.aio

from baton import rpc
from baton.errors import QueueError
from baton.internal.v1.worker_pb2_grpc import PrefillServiceStub
from gateway.decode_link import DecodeLink
from gateway.rest import Rest
from queueing.contract import GatewayQueue, Role, WorkerRecord
from scheduling.routing import Candidate

log = logging.getLogger(__name__)

# A worker that is not in the registry gets no new work at once, but keeps what it has for this
# long, and a decode worker for as long as it talks: Redis may have lost its data, and the worker,
# which is fine, registers anew.
MISSING_SECONDS = 2.0


class PrefillPeer:
    """A prefill worker and the channel to it."""

    def __init__(self, record: WorkerRecord) -> None:
        self.record = record
        self.outstanding = 0  # prompts that this gateway has there
        self.outstanding_tokens = 0  # in them
        self.rest = Rest()
        self.missing_since: float | None = None  # not in the registry
        self._channel: grpc.aio.Channel = rpc.channel(record.address)
        self.stub = PrefillServiceStub(self._channel)

    def is_usable(self, now: float) -> bool:
        """Requests may wait for it."""
        listed = self.missing_since is None and not self.record.draining
        return listed and not self.rest.is_faulty(now)

    def accepts(self, now: float) -> bool:
        """It may be given new work now."""
        return self.is_usable(now) and not self.rest.is_resting(now)

    @contextmanager
    def busy(self, tokens: int) -> Iterator[None]:
        """Count one prompt of so many tokens."""
        self.outstanding += 1
        self.outstanding_tokens += tokens
        try:
            yield
        finally:
            self.outstanding -= 1
            self.outstanding_tokens -= tokens

    def candidate(self) -> Candidate:
        """As routers see it."""
        load = self.record.load
        blocks = self.record.capacity_blocks
        return Candidate(
            id=self.record.id,
            sequences=max(self.outstanding, load.running + load.waiting if load else 0),
            queued_tokens=self.outstanding_tokens,
            free_blocks=load.free_blocks if load else blocks,
            total_blocks=blocks,
            outstanding_tokens=0,
        )

    async def close(self) -> None:
        """Close the channel; calls on it end as cancelled."""
        await self._channel.close(None)


class Fleet:
    """Polls the registry; keeps a channel to each prefill worker, a stream to each decode
    worker. When the registry cannot be reached the last known workers stand."""

    def __init__(
        self,
        queue: GatewayQueue,
        gateway_id: str,
        on_change: Callable[[], None],
        ahead: float,
        on_records: Callable[[list[WorkerRecord]], None] = lambda records: None,
    ) -> None:
        """`on_change` is called when there may be room that was not there before, `on_records` with
        what the registry has at each look; `ahead` is DecodeLink's."""
        self.prefill: dict[str, PrefillPeer] = {}
        self.decode: dict[str, DecodeLink] = {}
        self._queue = queue
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._ahead = ahead
        self._on_records = on_records
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._records: list[WorkerRecord] = []

    @property
    def records(self) -> list[WorkerRecord]:
        """The registry at the last look."""
        return self._records

    def max_context(self, model_limit: int) -> int:
        """Longest prompt plus output that every live worker takes."""
        return min([model_limit, *(r.max_context for r in self._records if r.max_context > 0)])

    async def run(self, interval: float) -> None:
        """Poll until cancelled."""
        reachable = True
        while True:
            try:
                await self.refresh()
                reachable = True
            except QueueError as error:
                if reachable:
                    log.warning("the worker registry cannot be reached: %s", error)
                reachable = False
            await asyncio.sleep(interval)

    async def refresh(self) -> None:
        """Look at the registry once. Raises QueueError."""
        self._records = await self._queue.workers()
        self._on_records(self._records)
        await self._update_prefill({r.id: r for r in self._records if r.role is Role.PREFILL})
        await self._update_decode({r.id: r for r in self._records if r.role is Role.DECODE})

    async def close(self) -> None:
        """End every stream and channel."""
        streams = list(self._streams.values())
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        await asyncio.gather(*(peer.close() for peer in self.prefill.values()))
        self.prefill.clear()
        self.decode.clear()
        self._streams.clear()

    async def _update_prefill(self, records: dict[str, WorkerRecord]) -> None:
        now = time.monotonic()
        for worker_id, peer in list(self.prefill.items()):
            record = records.get(worker_id)
            peer.missing_since = None if record else peer.missing_since or now
            if _is_gone(peer, record, now):
                # Prompts still there end as failed and are given to another worker.
                log.info("prefill worker %s is gone", worker_id)
                del self.prefill[worker_id]
                await peer.close()
        for worker_id, record in records.items():
            if (known := self.prefill.get(worker_id)) is not None:
                known.record = record
            else:
                log.info("prefill worker %s at %s", worker_id, record.address)
                self.prefill[worker_id] = PrefillPeer(record)
                self._on_change()

    async def _update_decode(self, records: dict[str, WorkerRecord]) -> None:
        now = time.monotonic()
        for worker_id, link in list(self.decode.items()):
            record = records.get(worker_id)
            link.missing_since = None if record else link.missing_since or now
            talks = link.slots and now - link.heard_at < MISSING_SECONDS
            if _is_gone(link, record, now) and not (talks and record is None):
                log.info("decode worker %s is gone", worker_id)
                del self.decode[worker_id]
                stream = self._streams.pop(worker_id)
                stream.cancel()
                await asyncio.gather(stream, return_exceptions=True)
        for worker_id, record in records.items():
            if (known := self.decode.get(worker_id)) is not None:
                known.update(record, now)
            else:
                log.info("decode worker %s at %s", worker_id, record.address)
                link = DecodeLink(record, self._gateway_id, self._on_change, self._ahead)
                self.decode[worker_id] = link
                self._streams[worker_id] = asyncio.create_task(link.run(), name=worker_id)


def _is_gone(peer: PrefillPeer | DecodeLink, record: WorkerRecord | None, now: float) -> bool:
    """It moved, or was missing for long enough to believe it."""
    if record is not None:
        return record.address != peer.record.address
    return peer.missing_since is not None and now - peer.missing_since >= MISSING_SECONDS
