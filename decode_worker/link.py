"""One gateway's stream: what this worker has to tell it, gathered into one message per step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from google.rpc import code_pb2

from baton import wire
from baton.internal.v1 import worker_pb2
from baton.types import Load, Output


class Link:
    """The outgoing half of a Decode stream.

    Producer: the worker, between passes. Consumer: `messages`, the RPC handler. A gateway that
    reads slowly gets fewer, larger messages; what waits for it is bounded by the tokens its own
    requests may still generate, and nobody else notices.
    """

    def __init__(self, gateway_id: str, load: Callable[[], Load]) -> None:
        self.gateway_id = gateway_id
        self._load = load
        self._pending = worker_pb2.DecodeResponse()
        self._ready = asyncio.Event()
        self._closed = False

    def output(self, slot: int, output: Output) -> None:
        """Tokens of one sequence; sent with the step's `flush`."""
        wire.put_output(self._pending.outputs.add(), output, slot)

    def event(self, event: worker_pb2.SlotEvent) -> None:
        """News of a slot; sent at once."""
        self._pending.events.append(event)
        self._ready.set()

    def failed(self, slot: int, code: code_pb2.Code, message: str) -> None:
        """The slot is gone."""
        failure = worker_pb2.SlotFailed(code=code, message=message)
        self.event(worker_pb2.SlotEvent(slot=slot, failed=failure))

    def flush(self, step: int) -> None:
        """The step is told in full: send it."""
        self._pending.step = step
        self._ready.set()

    def close(self) -> None:
        """The gateway sends no more commands: `messages` ends."""
        self._closed = True
        self._ready.set()

    async def messages(self) -> AsyncIterator[worker_pb2.DecodeResponse]:
        """Whatever is there, in one message, each time there is something, until `close`."""
        while not self._closed:
            await self._ready.wait()
            self._ready.clear()
            message, self._pending = self._pending, worker_pb2.DecodeResponse()
            message.load.CopyFrom(wire.load_to_proto(self._load()))
            yield message
