"""KV from one process's pool on a GPU into another's: from device to device, and by way of host
memory.

    python -m benchmarks.gpu.handoff DEVICE LAYERS BLOCKS

is the producer's process: for each line of block numbers on stdin it grants a sealed lease and
prints it. Pulls are whole ones: news over gRPC, digests on both sides, bytes, release. By way of
host memory means saved by the producer, copied through shared memory, loaded by the consumer. Both
ways take turns in one process; the first of each warms up.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import grpc.aio
import torch

from baton.internal.v1.kv_pb2_grpc import add_KvServiceServicer_to_server
from baton.types import KvRef
from engine.gpu.device_blocks import DeviceBlocks, SettledConsumer
from engine.gpu.shared_memory import memory_of
from engine.gpu.staging import Staging
from engine.model.pool import KvGeometry, KvPool
from engine.staged import StagedConsumer
from kv_transfer.channel import GrpcDialer, KvServicer
from kv_transfer.consumer import PullConsumer
from kv_transfer.contract import KvLayout, PullReport
from kv_transfer.producer import LeaseProducer
from kv_transfer.shm import allocate

WAYS = ("cuda_ipc", "shm")


@dataclass(frozen=True, slots=True)
class Size:
    """Of a pool: blocks of 64 KiB for each layer, those of Llama-3-8B."""

    layers: int = 32
    blocks: int = 256

    @property
    def geometry(self) -> KvGeometry:
        """What the bytes of its blocks mean."""
        return KvGeometry.of("benchmark", self.layers, 8, 128, torch.bfloat16, 16)


@dataclass(frozen=True, slots=True)
class Found:
    """Median seconds of each way, for all blocks and for one."""

    bytes: int
    all_blocks: dict[str, float]
    one_block: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times faster all blocks are from device to device."""
        return self.all_blocks["shm"] / self.all_blocks["cuda_ipc"]


def _staging(pool: KvPool, buffer: memoryview | None = None) -> tuple[Staging, DeviceBlocks]:
    staging, where = Staging(pool, buffer), pool.storage.device
    save = partial(staging.save, settled=True)
    return staging, DeviceBlocks(pool.storage, memory_of(where), save)


async def _serve(device: torch.device, size: Size) -> None:
    """The producer's process."""
    geometry = size.geometry
    total = size.blocks * geometry.block_bytes
    own = allocate(total).buffer if device.type == "cpu" else None
    pool = KvPool(geometry, size.blocks, device=device, buffer=own)
    pool.storage.view(torch.uint8).random_(0, 255)
    twin = allocate(total)
    staging, blocks = _staging(pool, twin.buffer)
    blocks.export()
    server = grpc.aio.server()
    producer = LeaseProducer(
        staging,
        KvLayout(**asdict(geometry)),
        control_address=f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}",
        on_freed=lambda lease_id: None,
        shared=twin,
        device=blocks,
    )
    add_KvServiceServicer_to_server(KvServicer(producer), server)
    await producer.start()
    await server.start()
    while line := await asyncio.to_thread(sys.stdin.readline):
        numbers = json.loads(line)
        blocks.rewritten(numbers)  # each time as if they had just been computed
        ref = producer.publish(numbers, 0)
        producer.seal(ref.lease_id)
        print(json.dumps(asdict(ref) | {"lease_id": ref.lease_id.hex()}), flush=True)
    await producer.close()
    await server.stop(None)


class _Producer:
    """That process, from here."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def lease(self, blocks: list[int]) -> KvRef:
        """A sealed lease on these blocks."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(blocks).encode() + b"\n")
        fields = json.loads(await self._process.stdout.readline())
        return KvRef(**fields | {"lease_id": bytes.fromhex(fields["lease_id"])})


@asynccontextmanager
async def _producer(device: torch.device, size: Size) -> AsyncIterator[_Producer]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.gpu.handoff",
        *map(str, (device, size.layers, size.blocks)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield _Producer(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def _compare(source: torch.device, device: torch.device, size: Size, rounds: int) -> Found:
    geometry = size.geometry
    pool = KvPool(geometry, size.blocks, device=device)
    layout = KvLayout(**asdict(geometry))
    staging, blocks = _staging(pool)
    dialers = {way: GrpcDialer(layout.digest, transports=[way], device=blocks) for way in WAYS}
    pulling = {way: PullConsumer(staging, layout, dialer) for way, dialer in dialers.items()}
    numbers = random.Random(7)
    sources, into = (numbers.sample(range(size.blocks), size.blocks) for _ in range(2))
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    async with _producer(source, size) as producer:
        for _ in range(rounds + 1):
            for way, consumer in pulling.items():
                pull = StagedConsumer(SettledConsumer(consumer, device), staging).pull
                for count in (size.blocks, 1):
                    ref = await producer.lease(sources[:count])
                    begun = asyncio.get_running_loop().time()
                    report: PullReport = await pull(ref, into[:count])
                    assert report.transport == way
                    took = asyncio.get_running_loop().time() - begun
                    seconds[way, count].append(took)
        for closing in (*pulling.values(), *dialers.values()):
            await closing.close()
    one, every = ({way: median(seconds[way, n][1:]) for way in WAYS} for n in (1, size.blocks))
    return Found(size.blocks * geometry.block_bytes, every, one)


def compare(
    source: torch.device, device: torch.device, rounds: int = 7, size: Size | None = None
) -> Found:
    """Pull from a pool on `source` into one on `device`, in both ways."""
    return asyncio.run(_compare(source, device, size or Size(), rounds))


if __name__ == "__main__":
    asyncio.run(_serve(torch.device(sys.argv[1]), Size(int(sys.argv[2]), int(sys.argv[3]))))
