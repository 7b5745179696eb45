"""One attempt to serve a request on one pair of workers, from claim to last token or failure.

    StartRequest ──▶ Reserved ──▶ Prefill ──▶ leased: AttachKv ──▶ prefilled: first token to the
    client ──▶ queue.handoff ──▶ Activate ──▶ tokens until the session is done

With local prefill everything after Reserved is the decode worker's. Whatever ends the attempt,
the slot is freed and the Prefill call cancelled, which ends the lease if nobody has taken the KV.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

import grpc
import grpc.aio
from google.rpc import code_pb2

from baton import wire
from baton.errors import InvalidRequest, QueueError, Unavailable
from baton.internal.v1.worker_pb2 import (
    AbortSequences,
    Activate,
    AttachKv,
    DecodeRequest,
    KvRef,
    LocalPrefill,
    Prefilled,
    PrefillRequest,
    PrefillResponse,
    SlotEvent,
    SlotFailed,
    StartRequest,
    StepOutput,
)
from baton.types import Claim
from gateway.decode_link import DecodeLink
from gateway.fleet import PrefillPeer
from gateway.outcome import WorkerBusy, WorkerFailed
from gateway.session import Session, State
from queueing.contract import GatewayQueue

log = logging.getLogger(__name__)

HANDOFF_SECONDS = 6.0  # to record a hand-off in; the claim of the prefill worker lives for longer
HANDOFF_PAUSE = 0.1


@dataclass(frozen=True, slots=True)
class Workers:
    """Who serves: without `prefill`, the decode worker prefills by itself. `uncached` tokens of the
    prompt are expected to be computed."""

    decode: DecodeLink
    prefill: PrefillPeer | None
    uncached: int


class Attempt:
    """Listens to its slot. `run` raises WorkerBusy, WorkerFailed or a BatonError for the client;
    it returns when the session is done."""

    def __init__(
        self, session: Session, claim: Claim, workers: Workers, queue: GatewayQueue
    ) -> None:
        self._session = session
        self._claim = claim
        self._workers = workers
        self._queue = queue
        self._slot = 0
        self._local = workers.prefill is None
        self._reserved = asyncio.Event()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._call: grpc.aio.UnaryStreamCall[PrefillRequest, PrefillResponse] | None = None

    async def run(self) -> None:
        """Serve the request."""
        self._session.move(State.RESERVING)
        job = self._session.job
        self._slot = self._workers.decode.open(self, job.request.sampling.n, job.tenant)
        work = asyncio.create_task(self._work(), name=f"attempt {self._session.id}")
        try:
            await asyncio.wait({work, self._failure}, return_when=asyncio.FIRST_COMPLETED)
            if not self._session.over:
                await (self._failure if self._failure.done() else work)
        finally:
            self._workers.decode.close(self._slot)
            if self._call is not None:
                self._call.cancel()  # no effect on a call that has ended
            work.cancel()
            self._failure.cancel()
            await asyncio.gather(work, self._failure, return_exceptions=True)

    async def _work(self) -> None:
        prefill = self._workers.prefill
        if prefill is not None and self._session.outputs[0].ending is not None:
            # A prefill worker goes on with sequence 0, and that one has ended.
            await self._handoff()
            self._local, prefill = True, None
        self._start()
        await self._reserved.wait()
        if self._session.over:
            return
        self._session.move(State.PREFILLING)
        if prefill is not None:
            with prefill.busy(self._workers.uncached):
                prefilled = await self._prefill(prefill)
            self._take_first(prefilled)
            if self._session.over:
                return
            self._session.move(State.HANDING_OFF)
            await self._handoff()
            self._activate(prefilled)
            self._session.move(State.DECODING)
        await self._session.done.wait()

    def _start(self) -> None:
        start = StartRequest(
            slot=self._slot,
            request=wire.request_to_proto(self._session.engine_request(), time.monotonic()),
            claim=wire.claim_to_proto(self._claim),
            local_prefill=self._local,
        )
        self._workers.decode.send(DecodeRequest(start=start))

    async def _prefill(self, peer: PrefillPeer) -> Prefilled:
        """Drive the Prefill call; the decode worker pulls while it goes on, and perhaps longer:
        the call ends with the lease."""
        session = self._session
        request = PrefillRequest(
            request=wire.request_to_proto(session.engine_request(), time.monotonic()),
            claim=wire.claim_to_proto(self._claim),
        )
        asked_at = time.monotonic()
        deadline = session.job.request.deadline
        timeout = None if deadline is None else max(0.0, deadline - asked_at)
        self._call = peer.stub.Prefill(request, timeout=timeout)
        try:
            async for response in self._call:
                match response.WhichOneof("event"):
                    case "leased":
                        self._attach(response.leased)
                    case "prefilled":
                        prefilled = response.prefilled
                        peer.rest.well()
                        waited = asked_at - session.job.request.arrived_at
                        self._note_prefill(waited, prefilled)
                        return prefilled
        except grpc.aio.AioRpcError as error:
            self._refused_by(peer, error)
        raise WorkerFailed(f"prefill worker {peer.record.id} ended without a token")

    def _refused_by(self, peer: PrefillPeer, error: grpc.aio.AioRpcError) -> None:
        match error.code():
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                peer.rest.busy(time.monotonic())
                raise WorkerBusy(f"prefill worker {peer.record.id} has no room") from error
            case grpc.StatusCode.INVALID_ARGUMENT:
                raise InvalidRequest.of("", error.details() or "refused by the worker") from error
            case code:
                peer.rest.fault(time.monotonic())
                raise WorkerFailed(f"prefill worker {peer.record.id}: {code.name}") from error

    def _note_prefill(self, waited: float, told: Prefilled | LocalPrefill) -> None:
        """Note how the first token came to be; later attempts prefill again, for later ones."""
        if not self._session.generated:
            stages = self._session.stages
            stages.queue = waited + wire.seconds(told.queued)
            stages.prefill = wire.seconds(told.computed)
            self._session.cached_tokens = told.cached_tokens

    def _attach(self, kv: KvRef) -> None:
        self._workers.decode.send(DecodeRequest(attach=AttachKv(slot=self._slot, kv=kv)))

    def _take_first(self, prefilled: Prefilled) -> None:
        if prefilled.prompt_logprobs:
            self._session.accept_prompt_logprobs(prefilled.prompt_logprobs)
        self._accept(prefilled.first)

    async def _handoff(self) -> None:
        """Record that the decode worker has it now. The KV waits meanwhile, under its lease."""
        to = self._workers.decode.record
        give_up_at = time.monotonic() + HANDOFF_SECONDS
        while True:
            try:
                claim = await self._queue.handoff(self._session.id, self._claim, to)
            except QueueError as error:
                if time.monotonic() > give_up_at:
                    raise Unavailable("the queue could not record the hand-off") from error
                await asyncio.sleep(HANDOFF_PAUSE)
            else:
                if claim is None:  # the worker is gone, or the queue has taken the request back
                    self._workers.decode.rest.fault(time.monotonic())
                    raise WorkerFailed(f"decode worker {to.id} cannot have it any more")
                self._claim = self._session.claim = claim
                self._session.worker_id = to.id
                return

    def _activate(self, prefilled: Prefilled) -> None:
        activate = Activate(
            slot=self._slot,
            claim=wire.claim_to_proto(self._claim),
            first_token_id=prefilled.first.token_ids[-1],
        )
        self._workers.decode.send(DecodeRequest(activate=activate))

    def expected_left(self, mean: float) -> int:
        """Output tokens still to come on the decode worker."""
        return self._session.expected_left(mean)

    # What the slot tells.

    def on_output(self, output: StepOutput) -> None:
        """New tokens."""
        if self._local and self._session.state is State.PREFILLING:
            self._session.move(State.DECODING)
        self._accept(output)

    def _accept(self, told: StepOutput) -> None:
        """Hand new tokens on. The worker need not go on with a sequence that ends here only, by a
        stop string, while others of the request do."""
        session, output = self._session, wire.output_from_proto(told, self._session.id)
        was_open = session.is_open(output.index)
        session.accept(output)
        ended_here = was_open and not session.is_open(output.index) and output.finish is None
        if ended_here and not session.over:
            unwanted = AbortSequences(slot=self._slot, indices=[output.index])
            self._workers.decode.send(DecodeRequest(abort_sequences=unwanted))

    def on_event(self, event: SlotEvent) -> None:
        """News between tokens."""
        stages = self._session.stages
        match event.WhichOneof("event"):
            case "reserved":
                self._workers.decode.rest.well()
                self._reserved.set()
            case "failed":
                self._fail(self._slot_error(event.failed))
            case "kv_arrived":
                stages.kv_transfer = wire.seconds(event.kv_arrived.duration)
            case "prompt_logprobs":
                self._session.accept_prompt_logprobs(event.prompt_logprobs.logprobs)
            case "local_prefill":
                self._note_prefill(stages.queue, event.local_prefill)

    def on_lost(self, reason: str) -> None:
        """The stream broke."""
        self._fail(WorkerFailed(f"decode worker {self._workers.decode.record.id}: {reason}"))

    def _slot_error(self, failed: SlotFailed) -> Exception:
        link = self._workers.decode
        match failed.code:
            case code_pb2.RESOURCE_EXHAUSTED:
                link.rest.busy(time.monotonic())
                return WorkerBusy(f"decode worker {link.record.id}: {failed.message}")
            case code_pb2.INVALID_ARGUMENT:
                return InvalidRequest.of("", failed.message)
            case _:
                link.rest.fault(time.monotonic())
                return WorkerFailed(f"decode worker {link.record.id}: {failed.message}")

    def _fail(self, error: Exception) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)
