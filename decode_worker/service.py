"""The DecodeService RPC: one stream per gateway, commands in, messages out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from baton import wire
from baton.errors import InvalidRequest
from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from decode_worker.link import Link
from decode_worker.slot import Activation
from decode_worker.worker import DecodeWorker


class DecodeService(worker_pb2_grpc.DecodeServiceServicer):
    """One RPC per gateway."""

    def __init__(self, worker: DecodeWorker) -> None:
        self._worker = worker

    async def Decode(
        self, request_iterator: AsyncIterator[worker_pb2.DecodeRequest], context: Any
    ) -> AsyncIterator[worker_pb2.DecodeResponse]:
        """Serve one gateway until either side ends the stream."""
        worker = self._worker
        commands = aiter(request_iterator)
        first = await anext(commands, None)
        if first is None or first.WhichOneof("command") != "hello":
            raise InvalidRequest.of("command", "the first one must be hello")
        link = worker.connect(first.hello.gateway_id)
        reader = asyncio.create_task(self._read(worker, link, commands))
        reader.add_done_callback(lambda _: link.close())
        link.flush(worker.engine.steps)  # the load, so that the gateway knows this worker
        try:
            async for message in link.messages():
                yield message
            await reader
        finally:
            reader.cancel()
            worker.disconnect(link)

    async def _read(
        self, worker: DecodeWorker, link: Link, commands: AsyncIterator[worker_pb2.DecodeRequest]
    ) -> None:
        async for message in commands:
            match message.WhichOneof("command"):
                case "start":
                    worker.start(link, message.start)
                case "attach":
                    attach = message.attach
                    worker.attach(link, attach.slot, wire.kv_ref_from_proto(attach.kv))
                case "activate":
                    claim = wire.claim_from_proto(message.activate.claim)
                    activation = Activation(claim, message.activate.first_token_id)
                    worker.activate(link, message.activate.slot, activation)
                case "abort":
                    worker.abort(link, message.abort.slots)
                case "abort_sequences":
                    aborted = message.abort_sequences
                    worker.abort_sequences(link, aborted.slot, aborted.indices)
                case other:
                    raise InvalidRequest.of("command", f"unexpected: {other}")
