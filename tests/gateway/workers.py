"""Workers without a model: real gRPC servers in the real registry, whose tokens follow a script."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

from baton import wire
from baton.errors import Unavailable
from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.rpc import Server
from baton.types import Load
from baton.v1.generation_pb2 import FINISH_REASON_LENGTH, TokenLogprob
from queueing.contract import Progress, Registration, Role
from queueing.redis_queue import RedisWorkerQueue


def scripted_token(position: int) -> int:
    """The output token at `position` of a sequence, whatever the prompt: byte-level letters."""
    return 5 + 65 + position % 26  # the alphabet follows five special tokens; 65 is "a"-ish


class FakeWorker:
    """What both kinds share: a server, a place in the registry, batched reports."""

    def __init__(self, role: Role, worker_id: str, redis_url: str, pool: str) -> None:
        self.role, self.id = role, worker_id
        self.held: dict[str, tuple[int, int]] = {}  # request id: fence, generated
        self.address = ""
        self.capacity_tokens = 10_000
        self.free_blocks = 1000
        self.batch_sequences: int | None = None
        self.prefix_block_size = 0
        self.worker_ttl = 0.6  # tests of those that die wait for it; more where it may not pass
        self._redis_url, self._pool = redis_url, pool

    def add_to(self, server: Server) -> None:
        raise NotImplementedError

    async def start(self) -> FakeWorker:
        self.server = Server("127.0.0.1:0")
        self.address = self.server.address
        self.add_to(self.server)
        await self.server.start([])
        registration = Registration(
            id=self.id,
            role=self.role,
            address=self.address,
            layout_digest="layout",
            model="weights",
            capacity_tokens=self.capacity_tokens,
            capacity_blocks=1000,
            max_context=200,
            batch_sequences=self.batch_sequences,
            prefix_block_size=self.prefix_block_size,
        )
        self.queue = RedisWorkerQueue(
            self._redis_url, self._pool, registration, worker_ttl=self.worker_ttl
        )
        await self.queue.register()
        self._reports = asyncio.create_task(self._report())
        return self

    def load(self) -> Load:
        return Load(len(self.held), 0, self.free_blocks, 1000)

    async def _report(self) -> None:
        while True:
            progress = [Progress(id, f, n, 0.0) for id, (f, n) in self.held.items()]
            if await self.queue.report(progress, self.load()) is None:
                await self.queue.register()
            await asyncio.sleep(0.1)

    async def freeze(self) -> None:
        """Stop reporting without closing anything."""
        self._reports.cancel()
        await asyncio.gather(self._reports, return_exceptions=True)

    async def kill(self) -> None:
        """Die without a word."""
        await self.freeze()
        await self.server.stop(0)
        await self.queue.close()

    async def stop(self) -> None:
        """Leave in order."""
        await self.queue.deregister()
        await self.kill()


class FakePrefill(FakeWorker, worker_pb2_grpc.PrefillServiceServicer):
    """Answers the first token after `delay`; raises the next of `failures` instead."""

    def __init__(self, *args) -> None:
        super().__init__(Role.PREFILL, *args)
        self.delay = 0.0
        self.cached_tokens = 0  # as it tells
        self.failures: list[Exception] = []
        self.requests: list[worker_pb2.PrefillRequest] = []
        self.cancelled = 0

    def add_to(self, server: Server) -> None:
        worker_pb2_grpc.add_PrefillServiceServicer_to_server(self, server.grpc)

    async def Prefill(self, request, context):
        self.requests.append(request)
        if self.failures:
            raise self.failures.pop(0)
        work = request.request
        prior = len(work.prior_outputs[0].token_ids) if work.prior_outputs else 0
        self.held[work.request_id] = (request.claim.fence, prior)
        try:
            tokens = len(work.prompt_token_ids) + prior
            yield worker_pb2.PrefillResponse(
                leased=worker_pb2.KvRef(lease_id=b"x" * 16, blocks=1, tokens=tokens)
            )
            await asyncio.sleep(self.delay)
            prefilled = worker_pb2.Prefilled(
                first=first_output(work, prior),
                computed=wire.duration(0.25),
                cached_tokens=self.cached_tokens,
            )
            if work.HasField("prompt_logprobs"):
                prefilled.prompt_logprobs.extend(
                    TokenLogprob(token_id=t, logprob=-1.0 if i else None)
                    for i, t in enumerate(work.prompt_token_ids)
                )
            yield worker_pb2.PrefillResponse(prefilled=prefilled)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.held.pop(work.request_id, None)


def first_output(work, prior: int) -> worker_pb2.StepOutput:
    output = worker_pb2.StepOutput(token_ids=[scripted_token(prior)])
    if prior + 1 == work.max_tokens:
        output.finish_reason = FINISH_REASON_LENGTH
    return output


@dataclass
class FakeSlot:
    work: worker_pb2.EngineRequest
    fence: int
    done: list[int]  # output tokens by sequence
    running: bool = False


class FakeDecode(FakeWorker, worker_pb2_grpc.DecodeServiceServicer):
    """One token per sequence and step until max_tokens. Each gateway's stream has slots of its
    own."""

    def __init__(self, *args) -> None:
        super().__init__(Role.DECODE, *args)
        self.step = 0.002
        self.paused = False
        self.refusals: list[int] = []  # code of the next SlotFailed
        self.refusing = False
        self.dies_after: int | None = None  # steps until the stream breaks
        self.slots: dict[tuple[int, int], FakeSlot] = {}  # by stream and number
        self._streams = itertools.count()
        self.started: list[worker_pb2.StartRequest] = []
        self.attached: list[int] = []
        self.aborted: list[int] = []
        self.unwanted: list[tuple[int, list[int]]] = []  # slot, sequences
        self.logprobs = False

    def add_to(self, server: Server) -> None:
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(self, server.grpc)

    async def Decode(self, request_iterator, context):
        stream = next(self._streams)
        events: list[worker_pb2.SlotEvent] = []
        reader = asyncio.create_task(self._read(request_iterator, events, stream))
        try:
            yield worker_pb2.DecodeResponse(load=wire.load_to_proto(self.load()))
            while True:
                await asyncio.sleep(self.step)
                message = worker_pb2.DecodeResponse(load=wire.load_to_proto(self.load()))
                message.events.extend(events)
                events.clear()
                if not self.paused:
                    message.outputs.extend(self._advance(stream))
                if message.events or message.outputs:
                    yield message
                if self.dies_after is not None and message.outputs:
                    self.dies_after -= 1
                    if self.dies_after <= 0:
                        self.dies_after = None
                        raise Unavailable("died")
        finally:
            reader.cancel()
            for key in [key for key in self.slots if key[0] == stream]:
                self._drop(key)

    async def _read(self, requests, events, stream: int) -> None:
        async for message in requests:
            match message.WhichOneof("command"):
                case "start":
                    self._start(message.start, events, stream)
                case "attach":
                    self.attached.append(message.attach.slot)
                case "activate" if slot := self.slots.get((stream, message.activate.slot)):
                    slot.fence = message.activate.claim.fence
                    slot.done[0] += 1
                    slot.running = True
                    self.held[slot.work.request_id] = (slot.fence, sum(slot.done))
                case "abort_sequences":
                    told = message.abort_sequences
                    self.unwanted.append((told.slot, [*told.indices]))
                case "abort":
                    self.aborted.extend(message.abort.slots)
                    for number in message.abort.slots:
                        self._drop((stream, number))

    def _start(self, start, events, stream: int) -> None:
        self.started.append(start)
        code = 8 if self.refusing else self.refusals.pop(0) if self.refusals else None
        if code is not None:
            failed = worker_pb2.SlotFailed(code=code, message="refused")
            events.append(worker_pb2.SlotEvent(slot=start.slot, failed=failed))
            return
        work, n = start.request, start.request.sampling.n
        done = [len(prior.token_ids) for prior in work.prior_outputs] or [0] * n
        slot = FakeSlot(work, start.claim.fence, done, running=start.local_prefill)
        self.slots[stream, start.slot] = slot
        if start.local_prefill:
            self.held[work.request_id] = (slot.fence, sum(done))
        reserved = worker_pb2.Reserved()
        events.append(worker_pb2.SlotEvent(slot=start.slot, reserved=reserved))

    def _drop(self, key: tuple[int, int]) -> None:
        if slot := self.slots.pop(key, None):
            self.held.pop(slot.work.request_id, None)

    def _advance(self, stream: int) -> list[worker_pb2.StepOutput]:
        outputs = []
        for key, slot in list(self.slots.items()):
            if key[0] != stream or not slot.running:
                continue
            limit = slot.work.max_tokens
            for index, done in enumerate(slot.done):
                prior = slot.work.prior_outputs[index] if slot.work.prior_outputs else None
                if done >= limit or (prior and prior.finished):
                    continue
                output = worker_pb2.StepOutput(
                    slot=key[1], index=index, token_ids=[scripted_token(done)]
                )
                if slot.work.HasField("logprobs"):
                    output.logprobs.add(token_id=scripted_token(done), logprob=-0.5, rank=1)
                slot.done[index] += 1
                if slot.done[index] == limit:
                    output.finish_reason = FINISH_REASON_LENGTH
                outputs.append(output)
            self.held[slot.work.request_id] = (slot.fence, sum(slot.done))
            if all(done >= limit for done in slot.done):
                self._drop(key)
        return outputs
