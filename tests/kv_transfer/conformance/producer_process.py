"""A producer in a process of its own, driven line by line on stdin.

argv: the KvLayout as JSON, blocks in the pool, time to live, and "device" if the pool shall count
as a device's. Commands: `publish N` (prints the KvRef as JSON), `advance HEX N`, `seal HEX`,
`leased` (prints the blocks held). The pool's bytes are those of numpy's default_rng(7), as in
conftest.
"""

from __future__ import annotations

import asyncio
import json
import sys

import grpc.aio
import numpy as np

from baton.internal.v1.kv_pb2_grpc import add_KvServiceServicer_to_server
from kv_transfer.channel import KvServicer
from kv_transfer.contract import KvLayout
from kv_transfer.device import SourcePool
from kv_transfer.producer import LeaseProducer
from kv_transfer.shm import allocate
from kv_transfer.store import BufferStore


def on_device(store: BufferStore) -> SourcePool:
    from tests.kv_transfer.devices import make_device

    device = make_device(store, lambda blocks: None)
    device.export()
    return device


async def main(layout: KvLayout, blocks: int, time_to_live: float, *where: str) -> None:
    shared = allocate(blocks * layout.block_bytes)
    pool = np.frombuffer(shared.buffer, np.uint8)
    pool[:] = np.random.default_rng(7).integers(0, 256, pool.size, np.uint8)
    store = BufferStore(shared.buffer, layout.block_bytes)
    server = grpc.aio.server()
    producer = LeaseProducer(
        store,
        layout,
        control_address=f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}",
        on_freed=lambda lease_id: None,
        shared=shared,
        device=on_device(store) if where else None,
        data_address="127.0.0.1:0",
        time_to_live=time_to_live,
    )
    add_KvServiceServicer_to_server(KvServicer(producer), server)
    await producer.start()
    await server.start()
    while command := (await asyncio.to_thread(sys.stdin.readline)).split():
        match command:
            case ["publish", count]:
                ref = producer.publish(range(int(count)), 0)
                fields = {name: getattr(ref, name) for name in ref.__slots__}
                print(json.dumps(fields | {"lease_id": ref.lease_id.hex()}), flush=True)
            case ["advance", lease, ready]:
                producer.advance(bytes.fromhex(lease), int(ready))
            case ["seal", lease]:
                producer.seal(bytes.fromhex(lease))
            case ["leased"]:
                print(producer.leased_blocks, flush=True)
    await producer.close()
    await server.stop(None)


if __name__ == "__main__":
    layout, blocks, seconds, *where = sys.argv[1:]
    asyncio.run(main(KvLayout(**json.loads(layout)), int(blocks), float(seconds), *where))
