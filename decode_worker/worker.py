"""Drives one engine for many gateways: commands in, tokens out, KV pulled in between."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from google.rpc import code_pb2

from baton import wire
from baton.errors import InvalidRequest, Overloaded
from baton.internal.v1 import worker_pb2
from baton.process import Background
from baton.types import KvRef, Load, Output
from decode_worker.link import Link
from decode_worker.metrics import DecodeMetrics
from decode_worker.slot import Activation, Slot, State
from engine.executor import Executor
from engine.loop import EngineLoop
from kv_transfer.contract import Consumer, PullReport
from queueing.contract import Progress, Verdict
from scheduling.decode import DecodeScheduler
from scheduling.events import DecodeEvent, LocalPrefill, PromptLogprobs, RequestFailed
from scheduling.plan import StepPlan
from scheduling.sequence import Sequence

log = logging.getLogger(__name__)


class DecodeWorker:
    """Slots over a DecodeScheduler. Everything here runs on the event loop; the scheduler is the
    engine's thread's, too, and touched under the engine's lock."""

    def __init__(
        self,
        executor: Executor,
        scheduler: DecodeScheduler,
        consumer: Consumer,
        metrics: DecodeMetrics,
        *,
        reserve_timeout: float,
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        """`on_idle` as in EngineLoop."""
        self._scheduler = scheduler
        self._block_size = executor.capacity.block_size
        self._consumer = consumer
        self._metrics = metrics
        self._reserve_timeout = reserve_timeout
        self._slots: dict[str, Slot] = {}  # by the scheduler's request id
        self._pulls = Background()
        self._links = 0
        self.draining = False
        self.engine = EngineLoop(scheduler, executor, self._on_events, on_idle=on_idle)

    # What gateways ask.

    def connect(self, gateway_id: str) -> Link:
        """A gateway opened its stream."""
        self._links += 1
        log.info("gateway %s connected", gateway_id)
        return Link(f"{gateway_id}/{self._links}", self.load)

    def disconnect(self, link: Link) -> None:
        """Its stream is gone, and with it everybody who could take the tokens."""
        slots = [slot for slot in self._slots.values() if slot.link is link]
        log.info("gateway %s disconnected, %d requests end", link.gateway_id, len(slots))
        for slot in slots:
            self._end(slot)

    def start(self, link: Link, command: worker_pb2.StartRequest) -> None:
        """Reserve room, or take the request in for local prefill; answers on the link."""
        now = time.monotonic()
        request = wire.request_from_proto(command.request, now)
        # Unique here even while an earlier attempt at the same request is still being cleared.
        request = replace(request, id=f"{link.gateway_id}/{command.slot}")
        slot = Slot(
            link=link,
            number=command.slot,
            request_id=command.request.request_id,
            request=request,
            claim=wire.claim_from_proto(command.claim),
            state=State.DECODING if command.local_prefill else State.RESERVED,
            arrived_at=now,
            open_sequences={i for i in range(request.sampling.n) if not request.prior(i).finished},
            generated=sum(len(prior.token_ids) for prior in request.prior_outputs),
        )
        try:
            if request.id in self._slots:
                raise InvalidRequest.of("slot", f"{command.slot} is in use")
            if command.local_prefill:
                with self.engine.lock:
                    sequences = self._scheduler.submit(request, now)
                    slot.levels = {sequence.index: sequence.level for sequence in sequences}
            else:
                with self.engine.lock:
                    slot.incoming = self._scheduler.reserve(request, now)
                slot.levels[0] = slot.incoming.level
                self._arm_expiry(slot)
        except InvalidRequest as error:
            link.failed(command.slot, code_pb2.INVALID_ARGUMENT, str(error))
            return
        except Overloaded as error:
            link.failed(command.slot, code_pb2.RESOURCE_EXHAUSTED, str(error))
            return
        self._slots[request.id] = slot
        reserved = worker_pb2.Reserved()
        link.event(worker_pb2.SlotEvent(slot=slot.number, reserved=reserved))
        self.engine.wake()

    def attach(self, link: Link, number: int, ref: KvRef) -> None:
        """Begin pulling the KV of a reserved slot. Ignored when the slot is gone."""
        slot = self._slots.get(f"{link.gateway_id}/{number}")
        if slot is None or slot.state is not State.RESERVED:
            return
        slot.move(State.PULLING)
        self._cancel_expiry(slot)  # the pull has deadlines of its own
        slot.pull = self._pulls.start(self._pull(slot, ref), f"pull {slot.request_id}")
        slot.pull.add_done_callback(lambda _: self._pulled(slot))

    def activate(self, link: Link, number: int, activation: Activation) -> None:
        """Let the slot decode as soon as its KV is here. Ignored when the slot is gone."""
        slot = self._slots.get(f"{link.gateway_id}/{number}")
        if slot is None or slot.state is not State.PULLING:
            return
        slot.activation = activation
        self._begin_if_ready(slot)

    def abort(self, link: Link, numbers: Iterable[int]) -> None:
        """End slots; unknown ones have ended already."""
        for number in numbers:
            if slot := self._slots.get(f"{link.gateway_id}/{number}"):
                self._end(slot)

    def abort_sequences(self, link: Link, number: int, indices: Iterable[int]) -> None:
        """End some sequences of a slot; unknown ones have ended already. Those that share a prompt
        which is still on its way end when it is here."""
        if slot := self._slots.get(f"{link.gateway_id}/{number}"):
            slot.unwanted |= slot.open_sequences.intersection(indices)
            if slot.state is State.DECODING:
                self._drop_unwanted(slot)

    def _drop_unwanted(self, slot: Slot) -> None:
        for index in slot.unwanted & slot.open_sequences:
            with self.engine.lock:
                self._scheduler.abort_sequence(slot.request.id, index)
            slot.open_sequences.discard(index)
        slot.unwanted.clear()
        if not slot.open_sequences:
            self._end(slot)
        self.engine.wake()

    # The hand-off.

    async def _pull(self, slot: Slot, ref: KvRef) -> None:
        sequence = slot.incoming
        assert sequence is not None
        try:
            if ref.blocks > len(sequence.blocks) or ref.tokens != len(sequence.tokens):
                raise InvalidRequest.of("kv", f"{ref.blocks} blocks do not fit the reservation")
            skip = sequence.cached // self._block_size
            slot.kv = report = await self._consumer.pull(
                ref, sequence.blocks[skip : ref.blocks], skip
            )
            self._metrics.pulled(report.transport, report.bytes)
        except Exception as error:
            # Whatever went wrong with the bytes, the tokens are here: recompute.
            log.warning("KV of request %s is recomputed: %s", slot.request_id, error)
            slot.kv = error

    def _pulled(self, slot: Slot) -> None:
        """The pull is over, cancelled before its first step or not: its pages are quiet."""
        if slot.state is State.PULLING:
            self._arm_expiry(slot)  # for the activation, if that is still to come
            self._begin_if_ready(slot)
        elif slot.incoming is not None:
            self._quiet(slot.incoming)
            self.engine.wake()

    def _quiet(self, sequence: Sequence) -> None:
        with self.engine.lock:
            self._scheduler.quiet(sequence)
        self._metrics.load(self.load())

    def _begin_if_ready(self, slot: Slot) -> None:
        if slot.kv is None or slot.activation is None:
            return
        sequence, now = slot.incoming, time.monotonic()
        assert sequence is not None
        slot.move(State.DECODING)
        slot.claim, slot.incoming = slot.activation.claim, None
        slot.generated += 1
        self._cancel_expiry(slot)
        moved = slot.kv if isinstance(slot.kv, PullReport) else None
        arrived = worker_pb2.KvArrived(
            duration=wire.duration(moved.seconds if moved else now - slot.arrived_at),
            bytes=moved.bytes if moved else 0,
            recomputed=moved is None,
        )
        slot.link.event(worker_pb2.SlotEvent(slot=slot.number, kv_arrived=arrived))
        take = self._scheduler.arrived if moved else self._scheduler.lost
        with self.engine.lock:
            events = take(sequence, slot.activation.first_token, now)
        for event in events:
            self._tell(slot, event)
        if slot.unwanted:
            self._drop_unwanted(slot)
        slot.link.flush(self.engine.steps)
        self.engine.wake()

    def _expire(self, slot: Slot) -> None:
        log.warning("request %s: no prefill came, its blocks are freed", slot.request_id)
        slot.link.failed(slot.number, code_pb2.RESOURCE_EXHAUSTED, "prefill did not come in time")
        self._end(slot)

    # The engine's news.

    def _on_events(self, plan: StepPlan, events: list[DecodeEvent], seconds: float) -> None:
        self._account(plan, seconds)
        touched = set()
        for event in events:
            if slot := self._slots.get(event.request_id):
                touched.add(slot.link)
                self._tell(slot, event)
        for link in touched:
            link.flush(self.engine.steps)
        with self.engine.lock:
            counters, prefixes = self._scheduler.counters, self._scheduler.prefixes
        self._metrics.residency(counters)
        self._metrics.prefixes(prefixes)
        self._metrics.load(self.load())

    def _account(self, plan: StepPlan, seconds: float) -> None:
        """Charge a pass to the requests that were in it, and see where it left them."""
        self._metrics.step(plan, seconds)
        for request_id in {chunk.sequence.request.id for chunk in plan.chunks}:
            if slot := self._slots.get(request_id):
                slot.served += seconds
        for chunk in plan.chunks:
            sequence = chunk.sequence
            if slot := self._slots.get(sequence.request.id):
                before = slot.levels.get(sequence.index, sequence.level)
                self._metrics.level(before, sequence.level)
                slot.levels[sequence.index] = sequence.level

    def _tell(self, slot: Slot, event: DecodeEvent) -> None:
        match event:
            case Output():
                slot.link.output(slot.number, event)
                slot.generated += len(event.token_ids)
                if event.finish is not None:
                    slot.open_sequences.discard(event.index)
                    if not slot.open_sequences:
                        self._end(slot)
            case PromptLogprobs():
                entries = wire.prompt_logprobs_to_proto(slot.request.prompt_ids, event.logprobs)
                told = worker_pb2.PromptLogprobs(logprobs=entries)
                slot.link.event(worker_pb2.SlotEvent(slot=slot.number, prompt_logprobs=told))
            case LocalPrefill():
                timing = worker_pb2.LocalPrefill(
                    queued=wire.duration(event.queued),
                    computed=wire.duration(event.computed),
                    cached_tokens=event.cached,
                )
                slot.link.event(worker_pb2.SlotEvent(slot=slot.number, local_prefill=timing))
            case RequestFailed():
                slot.link.failed(slot.number, code_pb2.INTERNAL, "the engine failed")
                self._end(slot)

    # The end, and what others need to know.

    def _end(self, slot: Slot) -> None:
        """Free everything a slot holds. Idempotent."""
        if slot.state is State.ENDED:
            return
        slot.move(State.ENDED)
        del self._slots[slot.request.id]
        self._cancel_expiry(slot)
        with self.engine.lock:
            self._scheduler.abort(slot.request.id, time.monotonic())
        if slot.pull is not None and not slot.pull.done():
            slot.pull.cancel()  # the pages are quiet when it has ended
        elif slot.incoming is not None:
            self._quiet(slot.incoming)
        self._metrics.load(self.load())  # there may be no pass to tell
        self.engine.wake()

    def _arm_expiry(self, slot: Slot) -> None:
        """Reserved blocks have an owner who may die: they do not wait for ever."""
        loop = asyncio.get_running_loop()
        slot.expiry = loop.call_later(self._reserve_timeout, self._expire, slot)

    def _cancel_expiry(self, slot: Slot) -> None:
        if slot.expiry is not None:
            slot.expiry.cancel()

    def progress(self) -> list[Progress]:
        """What this worker holds under a claim of its own, for the report."""
        return [
            Progress(slot.request_id, slot.claim.fence, slot.generated, slot.served)
            for slot in self._slots.values()
            if slot.state is State.DECODING
        ]

    def drop(self, progress: Progress, verdict: Verdict) -> None:
        """The queue says that a request is not ours any more: emit nothing for it."""
        for slot in list(self._slots.values()):
            if (slot.request_id, slot.claim.fence) == (progress.request_id, progress.fence):
                slot.link.failed(slot.number, code_pb2.ABORTED, f"claim is {verdict.name.lower()}")
                self._end(slot)

    def load(self) -> Load:
        """How busy this worker is."""
        with self.engine.lock:
            load = self._scheduler.cost.tell(self._scheduler.load())
        return replace(load, draining=self.draining)

    @property
    def idle(self) -> bool:
        """Nothing is held."""
        return not self._slots

    async def stop(self) -> None:
        """End every request and every pull, then the engine."""
        for slot in list(self._slots.values()):
            self._end(slot)
        await self._pulls.stop()
        await self.engine.stop()
