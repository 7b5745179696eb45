"""The hand-off between two real processes, and what a killed or frozen producer does to it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from baton.errors import KvTransferError
from baton.types import KvRef
from kv_transfer.channel import GrpcDialer
from kv_transfer.consumer import PullConsumer
from kv_transfer.store import BufferStore
from tests.kv_transfer.devices import make_device, need_interpreter

BLOCKS = 64
TIMEOUT = 1.5

pytestmark = pytest.mark.cluster


class Child:
    """A running producer_process.py."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    def say(self, *words: object) -> None:
        self.process.stdin.write((" ".join(map(str, words)) + "\n").encode())

    async def ask(self, *words: object) -> str:
        self.say(*words)
        async with asyncio.timeout(30):
            return (await self.process.stdout.readline()).decode()

    async def publish(self, count: int) -> KvRef:
        fields = json.loads(await self.ask("publish", count))
        return KvRef(**fields | {"lease_id": bytes.fromhex(fields["lease_id"])})


@contextlib.asynccontextmanager
async def running(layout, time_to_live: float = 30.0, where: Sequence[str] = ()):
    script = ("-m", "tests.kv_transfer.conformance.producer_process")
    arguments = [json.dumps(dataclasses.asdict(layout)), str(BLOCKS), str(time_to_live), *where]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *script,
        *arguments,
        cwd=Path(__file__).parents[3],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield Child(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.wait()
        process._transport.close()


@pytest.fixture(params=["shm", "tcp", "cuda_ipc"])
def transport(request) -> str:
    if request.param == "cuda_ipc":
        need_interpreter()
    return request.param


@pytest.fixture
def where(transport) -> Sequence[str]:
    """Of the producer's pool."""
    return ["device"] if transport == "cuda_ipc" else []


@pytest.fixture
async def consumer(transport, layout):
    """A consumer in this process, and its pool."""
    target = BufferStore(bytearray(BLOCKS * layout.block_bytes), layout.block_bytes)
    device = make_device(target, lambda blocks: None)
    dialer = GrpcDialer(layout.digest, transports=[transport], stall=TIMEOUT, device=device)
    pulling = PullConsumer(target, layout, dialer, timeout=TIMEOUT)
    yield pulling, target
    await pulling.close()
    await dialer.close()


def expected(layout) -> np.ndarray:
    size = BLOCKS * layout.block_bytes
    return np.random.default_rng(7).integers(0, 256, size, np.uint8).reshape(BLOCKS, -1)


async def test_blocks_cross_between_processes_while_they_are_filled(layout, consumer, where, until):
    pulling, target = consumer
    source = expected(layout)
    async with running(layout, where=where) as child:
        for into in (list(range(32)), list(range(63, 31, -1))):
            ref = await child.publish(32)
            pull = asyncio.create_task(pulling.pull(ref, into))
            child.say("advance", ref.lease_id.hex(), 10)
            await until(lambda into=into: bytes(target.block(into[9])) == source[9].tobytes())
            assert not pull.done()
            child.say("seal", ref.lease_id.hex())
            await pull
            for position, block in enumerate(into):
                assert bytes(target.block(block)) == source[position].tobytes()
        while (
            await child.ask("leased") != "0\n"
        ):  # the sender sees the end of a pull a moment later
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("ready", [0, 20])
async def test_a_killed_producer_is_noticed_at_once(layout, consumer, where, until, ready):
    pulling, target = consumer
    async with running(layout, where=where) as child:
        ref = await child.publish(32)
        child.say("advance", ref.lease_id.hex(), ready)
        pull = asyncio.create_task(pulling.pull(ref, range(32)))
        if ready:
            await until(lambda: any(target.block(ready - 1)))
        else:
            await asyncio.sleep(0.3)
        child.process.kill()
        started = time.monotonic()
        with pytest.raises(KvTransferError):
            await pull
        assert time.monotonic() - started < 1.0
        with pytest.raises(KvTransferError):
            await pulling.pull(ref, range(32))


async def test_a_frozen_producer_is_given_up_in_bounded_time(layout, consumer, where, until):
    pulling, target = consumer
    async with running(layout, where=where) as child:
        ref = await child.publish(32)
        child.say("advance", ref.lease_id.hex(), 4)
        pull = asyncio.create_task(pulling.pull(ref, range(32)))
        await until(lambda: any(target.block(3)))
        child.process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(KvTransferError):
            await pull
        assert time.monotonic() - started < 2.5 * TIMEOUT
        for block in range(BLOCKS):
            target.block(block)[:] = bytes(layout.block_bytes)
        child.say("seal", ref.lease_id.hex())
        child.process.send_signal(signal.SIGCONT)
        await asyncio.sleep(0.3)
        assert not any(any(target.block(block)) for block in range(BLOCKS))  # nothing comes late


async def test_a_dead_consumer_costs_the_producer_no_more_than_the_lease(layout, until):
    """The consumer is a process that vanishes in the middle: it neither releases nor renews."""
    program = (
        "import asyncio, json, sys\n"
        "from baton.types import KvRef\n"
        "from kv_transfer.channel import GrpcDialer\n"
        "from kv_transfer.consumer import PullConsumer\n"
        "from kv_transfer.contract import KvLayout\n"
        "from kv_transfer.store import BufferStore\n"
        "layout, ref = KvLayout(**json.loads(sys.argv[1])), json.loads(sys.argv[2])\n"
        "ref = KvRef(**ref | {'lease_id': bytes.fromhex(ref['lease_id'])})\n"
        "store = BufferStore(bytearray(8 * layout.block_bytes), layout.block_bytes)\n"
        "async def main():\n"
        "    pull = PullConsumer(store, layout, GrpcDialer(layout.digest)).pull(ref, range(8))\n"
        "    task = asyncio.create_task(pull)\n"
        "    while not any(store.block(3)): await asyncio.sleep(0.01)\n"
        "    print('here', flush=True)\n"
        "    await task\n"
        "asyncio.run(main())\n"
    )
    async with running(layout, time_to_live=1.0) as child:
        ref = await child.publish(8)
        child.say("advance", ref.lease_id.hex(), 4)
        fields = dataclasses.asdict(ref) | {"lease_id": ref.lease_id.hex()}
        consumer = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            program,
            json.dumps(dataclasses.asdict(layout)),
            json.dumps(fields),
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        async with asyncio.timeout(30):
            assert await consumer.stdout.readline() == b"here\n"
        await asyncio.sleep(1.5)
        assert await child.ask("leased") == "8\n"  # renewed while the consumer lives
        consumer.kill()
        await consumer.wait()
        consumer._transport.close()
        await asyncio.sleep(2.0)
        assert await child.ask("leased") == "0\n"
