"""A prefill and a decode worker in one process, with a test in the gateway's place."""

from __future__ import annotations

import asyncio
import contextlib
import time
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from baton import wire
from baton.internal.v1 import worker_pb2
from baton.prefix import block_keys
from baton.types import Claim, FinishReason, KvRef, Request, Sampling, Stopping
from decode_worker.link import Link
from decode_worker.metrics import DecodeMetrics
from decode_worker.slot import Activation
from decode_worker.worker import DecodeWorker
from engine.metrics import EngineMetrics
from engine.simulated import CostModelExecutor, checksum_token, expected_tokens
from kv_transfer.consumer import PullConsumer
from kv_transfer.contract import KvLayout
from kv_transfer.memory import Network
from kv_transfer.producer import LeaseProducer
from prefill_worker.worker import PrefillWorker
from scheduling.cost import LinearCost
from scheduling.decode import DecodeScheduler
from scheduling.events import Prefilled
from scheduling.order import make_policy
from scheduling.plan import Capacity
from scheduling.prefill import PrefillScheduler
from scheduling.rules import Rules

TOKEN_OF = checksum_token(1000)
CAPACITY = Capacity(blocks=64, block_size=4, max_tokens=16, max_sequences=8, max_context=256)
LAYOUT = KvLayout("model", 1, 1, 1, "int32", CAPACITY.block_size, 2)  # 4 bytes a token


def request(name: str, prompt: int, new: int, **sampling: int) -> Request:
    """A request with a prompt of its own."""
    ids = tuple((zlib.crc32(name.encode()) + i) % 1000 for i in range(prompt))
    return Request(name, ids, Sampling(**sampling), Stopping(max_tokens=new))


def expected(one: Request, index: int = 0) -> list[int]:
    """The tokens it must get."""
    return expected_tokens(one, index, TOKEN_OF)


@dataclass
class Heard:
    """What a gateway was told of one slot."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, FinishReason] = field(default_factory=dict)
    events: list[worker_pb2.SlotEvent] = field(default_factory=list)
    messages: int = 0

    def event(self, kind: str) -> worker_pb2.SlotEvent | None:
        """The first event of this kind."""
        return next((e for e in self.events if e.WhichOneof("event") == kind), None)


class Pair:
    """Both workers, their pools joined by the in-process transport."""

    def __init__(
        self,
        capacity: Capacity = CAPACITY,
        step_seconds: float = 0.0005,
        *,
        rules: Rules | None = None,
        policy: str = "fcfs",
        swap_seconds_per_block: float = 0.0,
    ) -> None:
        """`rules` and `policy` are the decode worker's."""
        self.registry = registry = CollectorRegistry()
        self.network = Network()
        self.executors = [
            CostModelExecutor(
                capacity,
                LinearCost(step_seconds, 0, 0),
                TOKEN_OF,
                swap_seconds_per_block=swap_seconds_per_block,
                sleep=time.sleep,
            )
            for _ in range(2)
        ]
        prefilling, decoding = self.executors
        self.producer = LeaseProducer(
            prefilling.store,
            LAYOUT,
            control_address="prefill-0",
            on_freed=lambda lease: self.prefill.on_freed(lease),
        )
        self.network.attach(self.producer, prefilling.store)
        self.schedulers = (
            PrefillScheduler(capacity, make_policy("fcfs"), max_waiting=64, block_keys=block_keys),
            DecodeScheduler(
                capacity, make_policy(policy), max_waiting=64, rules=rules, block_keys=block_keys
            ),
        )
        self.prefill = PrefillWorker(
            prefilling, self.schedulers[0], self.producer, EngineMetrics("prefill", registry)
        )
        self.consumer = PullConsumer(
            decoding.store, LAYOUT, self.network.dialer(LAYOUT.digest), timeout=1.0
        )
        self.decode = DecodeWorker(
            decoding,
            self.schedulers[1],
            self.consumer,
            DecodeMetrics(decoding.store.block_bytes, registry),
            reserve_timeout=0.3,
        )
        self.heard: defaultdict[int, Heard] = defaultdict(Heard)
        self.prefilled: dict[int, Prefilled] = {}
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Pair:
        await self.producer.start()
        self.prefill.engine.start()
        self.decode.engine.start()
        self.link = self.decode.connect("gateway")
        self._listener = asyncio.create_task(self._listen(self.link))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.cancel()
        await self.decode.stop()
        await self.prefill.stop()
        await self.consumer.close()
        await self.producer.close()
        for scheduler in self.schedulers:
            scheduler.check_integrity()

    async def _listen(self, link: Link) -> None:
        async for message in link.messages():
            for output in message.outputs:
                heard = self.heard[output.slot]
                heard.tokens.setdefault(output.index, []).extend(output.token_ids)
                if output.finish_reason:
                    heard.finished[output.index] = FinishReason(output.finish_reason)
            for event in message.events:
                self.heard[event.slot].events.append(event)
            for slot in {output.slot for output in message.outputs}:
                self.heard[slot].messages += 1
            async with self._changed:
                self._changed.notify_all()

    async def until(self, met: object) -> None:
        """Wait until `met()` holds, looking at each message and now and then."""
        assert callable(met)
        async with asyncio.timeout(10):
            while not met():
                with contextlib.suppress(TimeoutError):
                    async with self._changed, asyncio.timeout(0.02):
                        await self._changed.wait()

    def start(self, slot: int, one: Request, *, local: bool = False) -> None:
        """Ask the decode worker for room."""
        self.decode.start(
            self.link,
            worker_pb2.StartRequest(
                slot=slot,
                request=wire.request_to_proto(one, now=0.0),
                claim=wire.claim_to_proto(Claim(slot)),
                local_prefill=local,
            ),
        )

    async def hand_off(self, slot: int, one: Request) -> KvRef:
        """Prefill one request and let the decode worker go on; returns the lease."""
        ref: KvRef | None = None
        async for news in self.prefill.prefill(one, Claim(slot)):
            if isinstance(news, KvRef):
                ref = news
                self.decode.attach(self.link, slot, ref)
            else:
                heard = self.heard[slot]
                heard.tokens.setdefault(0, []).extend(news.output.token_ids)
                self.prefilled[slot] = news
                first = news.output.token_ids[0]
                self.decode.activate(self.link, slot, Activation(Claim(1000 + slot), first))
        assert ref is not None
        return ref

    def metric(self, name: str) -> float | None:
        """What Prometheus is told as `baton_{name}`."""
        return self.registry.get_sample_value(f"baton_{name}")

    async def finished(self, slot: int, sequences: int = 1) -> Heard:
        """Wait for the end of all sequences of a slot."""
        await self.until(lambda: len(self.heard[slot].finished) == sequences)
        return self.heard[slot]

    async def all_free(self) -> None:
        """Wait until neither worker holds a block."""
        await self.until(
            lambda: all(
                load.free_blocks == load.total_blocks
                for load in (self.prefill.load(), self.decode.load())
            )
        )


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """Two workers, running."""
    async with Pair() as workers:
        yield workers
