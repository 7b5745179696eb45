"""The one long-lived stream between this gateway and a decode worker."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import grpc
import grpc.aio

from baton import rpc, wire
from baton.internal.v1.worker_pb2 import (
    AbortSlots,
    DecodeRequest,
    DecodeResponse,
    Hello,
    SlotEvent,
    StepOutput,
)
from baton.internal.v1.worker_pb2_grpc import DecodeServiceStub
from baton.types import Load
from gateway.outcome import WorkerFailed
from gateway.rest import Rest
from queueing.contract import WorkerRecord
from scheduling.routing import Candidate

log = logging.getLogger(__name__)

RECONNECT_SECONDS = 0.1
MAX_RECONNECT_SECONDS = 2.0
QUIET_SECONDS = 0.5
MAX_RESERVING = 16  # requests that wait for the worker's word on room: a full one refuses them all


class SlotListener(Protocol):
    """Whoever opened a slot. Called by the stream's reader: must not block or raise."""

    def on_output(self, output: StepOutput) -> None:
        """New tokens."""
        ...

    def on_event(self, event: SlotEvent) -> None:
        """News between tokens."""
        ...

    def on_lost(self, reason: str) -> None:
        """The stream broke: the worker has dropped the slot."""
        ...

    def expected_left(self, mean: float) -> int:
        """Output tokens still to come, where an output has `mean` if nothing was predicted."""
        ...


class DecodeLink:
    """Slots on a decode worker. Reconnects for as long as `run` runs; a break loses all slots."""

    def __init__(
        self, record: WorkerRecord, gateway_id: str, on_change: Callable[[], None], ahead: float
    ) -> None:
        """`on_change` is called when the worker may have room that it had not before. It is sent
        `ahead` times as many sequences as fit its batch in addition to those."""
        self.record = record
        self.load: Load | None = record.load
        self.connected = False
        self.rest = Rest()
        self.missing_since: float | None = None  # not in the registry
        self.heard_at = 0.0
        self._gateway_id = gateway_id
        self._on_change = on_change
        self._ahead = ahead
        self._listeners: dict[int, SlotListener] = {}
        self._sequences: dict[int, int] = {}  # by slot
        self._tenants: dict[int, str] = {}  # by slot
        self._held: Counter[str] = Counter()  # sequences, by tenant
        self._others = 0  # sequences of other gateways, at the last word on the load
        self._reserving: set[int] = set()  # slots the worker has not answered for
        self._numbers = itertools.count(1)
        self._commands: asyncio.Queue[DecodeRequest] = asyncio.Queue()

    @property
    def slots(self) -> int:
        """Requests of this gateway on the worker."""
        return len(self._listeners)

    @property
    def free_blocks(self) -> int:
        """KV blocks that were free at the last word from the worker."""
        return self.record.capacity_blocks if self.load is None else self.load.free_blocks

    @property
    def pressure(self) -> int:
        """Sequences on the worker or on their way to it: our own as of now, those of other
        gateways as of the worker's last word."""
        return sum(self._sequences.values()) + self._others

    @property
    def openings(self) -> int:
        """Requests that may be sent now. More would only wait there, where the queue can no longer
        give them to another worker or put a more urgent one before them."""
        unanswered = MAX_RESERVING - len(self._reserving)
        places = self._places
        if places is None:
            return max(0, unanswered)
        return max(0, min(unanswered, places - self.pressure))

    @property
    def has_place(self) -> bool:
        """One more sequence would be in the batch at once, as far as is known."""
        batch = self.record.batch_sequences
        return batch is None or self.pressure < batch

    def owes(self, tenant: str, tenants: int) -> bool:
        """Whether a request of this tenant may be sent now, room or not: of ours, it has less than
        its share of the places there. `tenants`: how many have live requests here."""
        if self._places is None or len(self._reserving) >= MAX_RESERVING:
            return False
        return self._held[tenant] < max(1, self._places // tenants)

    @property
    def _places(self) -> int | None:
        """How many sequences the worker is sent at most; None if it does not say what fits."""
        batch = self.record.batch_sequences
        return None if batch is None else batch + max(1, math.ceil(batch * self._ahead))

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that so many tokens fill there."""
        return math.ceil(tokens * self.record.capacity_blocks / self.record.capacity_tokens)

    def candidate(self, mean: float) -> Candidate:
        """As routers see it. Outputs have `mean` tokens where nothing was predicted."""
        mine = sum(listener.expected_left(mean) for listener in self._listeners.values())
        return Candidate(
            id=self.record.id,
            sequences=self.pressure,
            free_blocks=self.free_blocks,
            total_blocks=self.record.capacity_blocks,
            outstanding_tokens=mine + round(self._others * mean),
            slots=self.record.batch_sequences,
        )

    def accepts(self, now: float) -> bool:
        """It may be given new work, and has room for it."""
        return self.is_usable(now) and self.openings > 0

    def is_usable(self, now: float) -> bool:
        """It may be given new work."""
        draining = self.record.draining or (self.load is not None and self.load.draining)
        listed = self.missing_since is None and not draining
        rested = not self.rest.is_resting(now)
        return self.connected and listed and rested

    def update(self, record: WorkerRecord, now: float) -> None:
        """What the registry knows. Its load stands where the worker has told us nothing lately,
        as it has no reason to while we have nothing there."""
        self.record = record
        if record.load is not None and now - self.heard_at > QUIET_SECONDS:
            self._note(record.load)
            self._on_change()

    def open(self, listener: SlotListener, sequences: int = 1, tenant: str = "") -> int:
        """A new slot. Raises WorkerFailed when the stream is down."""
        if not self.connected:
            raise WorkerFailed(f"decode worker {self.record.id} is not connected")
        slot = next(self._numbers)
        self._listeners[slot] = listener
        self._sequences[slot] = sequences
        self._tenants[slot] = tenant
        self._held[tenant] += sequences
        self._reserving.add(slot)
        return slot

    def send(self, command: DecodeRequest) -> None:
        """Queue a command."""
        self._commands.put_nowait(command)

    def close(self, slot: int) -> None:
        """Forget a slot and have the worker free it. Harmless when it is gone already."""
        self._reserving.discard(slot)
        if (tenant := self._tenants.pop(slot, None)) is not None:
            self._held[tenant] -= self._sequences.pop(slot)
            if not self._held[tenant]:
                del self._held[tenant]
        if self._listeners.pop(slot, None) is not None:
            self.send(DecodeRequest(abort=AbortSlots(slots=[slot])))

    async def run(self) -> None:
        """Keep the stream up until cancelled."""
        delay = RECONNECT_SECONDS
        while True:
            reason = "the worker ended the stream"
            try:
                await self._stream()
            except grpc.aio.AioRpcError as error:
                reason = f"{error.code().name}: {error.details()}"
            except Exception as error:
                log.exception("decode worker %s", self.record.id)
                reason = str(error)
            finally:
                was_connected = self.connected
                self._lose("the stream to the decode worker broke")
            if was_connected:
                log.warning("decode worker %s: %s", self.record.id, reason)
                delay = RECONNECT_SECONDS
            await asyncio.sleep(delay)
            delay = min(2 * delay, MAX_RECONNECT_SECONDS)

    async def _stream(self) -> None:
        self._commands = asyncio.Queue()
        async with rpc.channel(self.record.address) as channel:
            call = DecodeServiceStub(channel).Decode()  # type: ignore[call-arg] # the stubs want one
            writer = asyncio.create_task(self._write(call, self._commands))
            try:
                async for response in call:
                    self._receive(response)
            finally:
                writer.cancel()
                call.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    async def _write(
        self,
        call: grpc.aio.StreamStreamCall[DecodeRequest, DecodeResponse],
        commands: asyncio.Queue[DecodeRequest],
    ) -> None:
        await call.write(DecodeRequest(hello=Hello(gateway_id=self._gateway_id)))
        while True:
            await call.write(await commands.get())

    def _receive(self, response: DecodeResponse) -> None:
        self.heard_at = time.monotonic()
        for event in response.events:
            if event.slot in self._reserving:
                self._reserving.discard(event.slot)
                self._on_change()
            if listener := self._listeners.get(event.slot):
                listener.on_event(event)
        for output in response.outputs:
            if listener := self._listeners.get(output.slot):
                listener.on_output(output)
        if response.HasField("load"):
            self._note(wire.load_from_proto(response.load))
        if not self.connected:
            log.info("decode worker %s: connected", self.record.id)
            self.connected = True
            self._on_change()

    def _note(self, load: Load) -> None:
        self.load = load
        own = sum(n for slot, n in self._sequences.items() if slot not in self._reserving)
        self._others = max(0, load.running + load.waiting - own)

    def _lose(self, reason: str) -> None:
        self.connected = False
        listeners, self._listeners = self._listeners, {}
        self._reserving.clear()
        self._sequences.clear()
        self._tenants.clear()
        self._held.clear()
        for listener in listeners.values():
            listener.on_lost(reason)
