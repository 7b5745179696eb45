"""The PrefillService RPC."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from baton import wire
from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.types import KvRef, Request
from prefill_worker.worker import PrefillWorker
from scheduling.events import Prefilled


class PrefillService(worker_pb2_grpc.PrefillServiceServicer):
    """One RPC per prefill."""

    def __init__(self, worker: PrefillWorker) -> None:
        self._worker = worker

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: Any
    ) -> AsyncIterator[worker_pb2.PrefillResponse]:
        """Prefill one request; a cancelled RPC stops the work."""
        engine_request = wire.request_from_proto(request.request, time.monotonic())
        claim = wire.claim_from_proto(request.claim)
        async with aclosing(self._worker.prefill(engine_request, claim)) as news:
            async for event in news:
                yield _response(event, engine_request)


def _response(event: KvRef | Prefilled, request: Request) -> worker_pb2.PrefillResponse:
    if isinstance(event, KvRef):
        return worker_pb2.PrefillResponse(leased=wire.kv_ref_to_proto(event))
    prefilled = worker_pb2.Prefilled(
        first=wire.output_to_proto(event.output, slot=0),
        queued=wire.duration(event.queued),
        computed=wire.duration(event.computed),
        cached_tokens=event.cached,
    )
    if request.prompt_logprobs is not None:  # a prompt of one token has an entry, but no logprob
        prefilled.prompt_logprobs.extend(
            wire.prompt_logprobs_to_proto(request.prompt_ids, event.prompt_logprobs)
        )
    return worker_pb2.PrefillResponse(prefilled=prefilled)
