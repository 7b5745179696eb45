"""How fast KV blocks move: each transport beside a plain memcpy in the same run.

    python benchmarks/transfer.py [--bytes 134217728] [--repeats 7] [--json]

The producer is a process of its own for shm and tcp. `pull` is what a decode worker waits for:
lease, news over gRPC, bytes, digests on both sides, release. `memcpy` copies the same scattered
blocks within one process, `memcpy + digest` also hashes them, which is the most that one thread
can do. Medians over interleaved repeats; `ratio` is against memcpy.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import sys
import time
from collections import defaultdict

import grpc.aio
import numpy as np

from baton.internal.v1.kv_pb2_grpc import add_KvServiceServicer_to_server
from baton.types import KvRef
from kv_transfer.channel import GrpcDialer, KvServicer
from kv_transfer.consumer import PullConsumer
from kv_transfer.contract import KvLayout
from kv_transfer.digest import block_digest
from kv_transfer.memory import Network
from kv_transfer.producer import LeaseProducer
from kv_transfer.shm import SharedPool, allocate
from kv_transfer.store import BufferStore, block_array

KIB = 2**10


def layout_of(block_bytes: int) -> KvLayout:
    """A layout whose blocks have this size."""
    return KvLayout("benchmark", 1, 1, 1, "uint8", block_bytes // 2, 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One way of moving the bytes; `ratio` is its speed against memcpy's."""

    gigabytes_per_second: float
    ratio: float
    one_block_us: float | None


def filled_store(layout: KvLayout, total: int) -> tuple[BufferStore, SharedPool]:
    """A pool of `total` bytes, every page touched."""
    shared = allocate(total)
    np.frombuffer(shared.buffer, np.uint8)[:] = 1
    return BufferStore(shared.buffer, layout.block_bytes), shared


async def serve(block_bytes: int, total: int) -> None:
    """The producer's process: for each line of block numbers on stdin, grants a sealed lease and
    prints it."""
    layout = layout_of(block_bytes)
    store, shared = filled_store(layout, total)
    server = grpc.aio.server()
    producer = LeaseProducer(
        store,
        layout,
        control_address=f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}",
        on_freed=lambda lease_id: None,
        shared=shared,
        data_address="127.0.0.1:0",
    )
    add_KvServiceServicer_to_server(KvServicer(producer), server)
    await producer.start()
    await server.start()
    while line := await asyncio.to_thread(sys.stdin.readline):
        ref = producer.publish(json.loads(line), 0)
        producer.seal(ref.lease_id)
        fields = dataclasses.asdict(ref) | {"lease_id": ref.lease_id.hex()}
        print(json.dumps(fields), flush=True)
    await producer.close()
    await server.stop(None)


async def measure(block_bytes: int, total: int, repeats: int) -> dict[str, Row]:
    """Every way in turn, `repeats` times."""
    layout = layout_of(block_bytes)
    count = total // block_bytes
    sources, into = (random.Random(seed).sample(range(count), count) for seed in (1, 2))
    store, _ = filled_store(layout, total)
    target, _ = filled_store(layout, total)
    network = Network()
    local = LeaseProducer(store, layout, control_address="local", on_freed=lambda lease_id: None)
    network.attach(local, store)
    await local.start()
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        __file__,
        "--serve",
        str(block_bytes),
        "--bytes",
        str(total),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert child.stdin is not None and child.stdout is not None

    async def lease(transport: str, blocks: list[int]) -> KvRef:
        """A sealed lease whose digests have been taken."""
        if transport == "memory":
            ref = local.publish(blocks, 0)
            local.seal(ref.lease_id)
        else:
            child.stdin.write(json.dumps(blocks).encode() + b"\n")
            fields = json.loads(await child.stdout.readline())
            ref = KvRef(**fields | {"lease_id": bytes.fromhex(fields["lease_id"])})
        await asyncio.sleep(0.05)
        return ref

    def copy(*, digest: bool) -> float:
        start = time.perf_counter()
        for i, (a, b) in enumerate(zip(sources, into, strict=True)):
            np.copyto(block_array(target, b), block_array(store, a))
            if digest:
                block_digest(target.block(b), i)
        return time.perf_counter() - start

    dialers = {name: GrpcDialer(layout.digest, transports=[name]) for name in ("shm", "tcp")}
    consumers = {
        name: PullConsumer(target, layout, dialers.get(name) or network.dialer(layout.digest))
        for name in ("memory", "shm", "tcp")
    }
    seconds: dict[str, list[float]] = defaultdict(list)
    latency: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats + 1):
        seconds["memcpy"].append(copy(digest=False))
        seconds["memcpy + digest"].append(copy(digest=True))
        for name, consumer in consumers.items():
            whole = await consumer.pull(await lease(name, sources), into)
            seconds[name].append(whole.seconds)
            one = await consumer.pull(await lease(name, sources[:1]), into[:1])
            latency[name].append(one.seconds)
    child.stdin.close()
    for closing in (*consumers.values(), *dialers.values(), local):
        await closing.close()
    await child.wait()
    return {
        name: Row(
            gigabytes_per_second=total / statistics.median(values[1:]) / 1e9,  # the first warms up
            ratio=statistics.median(seconds["memcpy"][1:]) / statistics.median(values[1:]),
            one_block_us=statistics.median(latency[name][1:]) * 1e6 if name in latency else None,
        )
        for name, values in seconds.items()
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="GB/s and latency of the KV hand-off")
    parser.add_argument("--bytes", type=int, default=128 * KIB * KIB, help="bytes per transfer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)  # block size
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve, options.bytes))
        return
    results = {
        kib: asyncio.run(measure(kib * KIB, options.bytes, options.repeats)) for kib in (64, 2048)
    }
    if options.json:
        plain = {
            kib: {name: dataclasses.asdict(row) for name, row in rows.items()}
            for kib, rows in results.items()
        }
        print(json.dumps(plain, indent=2))
        return
    print(f"{'block':>8}  {'way':<16} {'GB/s':>6} {'ratio':>6} {'one block':>10}")
    for kib, rows in results.items():
        for name, row in rows.items():
            once = "" if row.one_block_us is None else f"{row.one_block_us:.0f} us"
            speed = f"{row.gigabytes_per_second:6.2f} {row.ratio:6.2f}"
            print(f"{kib:>4} KiB  {name:<16} {speed} {once:>10}")


if __name__ == "__main__":
    main()
