"""Blocks that are copied from one process's device pool into another's."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import host_blocks
from engine.gpu.device_blocks import DeviceBlocks, SettledConsumer, SettledExecutor
from engine.gpu.kernels.launch import interpreted
from engine.gpu.shared_memory import HostMemory, Opened, memory_of
from engine.gpu.staging import Staging
from engine.model.memory import OwnMemory
from engine.model.pool import KvGeometry, KvPool
from engine.staged import SavingExecutor

# Pools on a CPU need the interpreter.
on_cpu = pytest.mark.skipif(not interpreted(), reason="kernels run on the GPU here")

_FORMATS = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
_CPU = torch.device("cpu")


def _pool(dtype: torch.dtype, device: torch.device, *, shared: bool = False) -> KvPool:
    """Nine blocks of random bytes."""
    geometry = KvGeometry.of("", 2, 1, 16, dtype, 4)
    size = 9 * geometry.block_bytes
    memory = OwnMemory(size) if shared and device.type == "cpu" else None
    made = KvPool(geometry, 9, device=device, buffer=memory.buffer if memory else None)
    made.storage.view(torch.uint8).random_(0, 255)
    return made


def _blocks(pool: KvPool, memory: Any = None) -> DeviceBlocks:
    return DeviceBlocks(pool.storage, memory or memory_of(pool.storage.device), print)


def _rows(pool: KvPool) -> torch.Tensor:
    """[blocks, bytes]"""
    return pool.storage.view(torch.uint8).view(pool.blocks, -1)


@on_cpu
@pytest.mark.parametrize("dtype", _FORMATS, ids=str)
def test_blocks_are_copied_whole_and_digested_alike_on_both_sides(dtype: torch.dtype) -> None:
    source, target = _pool(dtype, _CPU, shared=True), _pool(dtype, _CPU)
    producer, consumer = _blocks(source), _blocks(target)
    producer.export()
    expected = _rows(target).clone()
    expected[[2, 8]] = _rows(source)[[7, 1]]
    opened = consumer.open(producer.handle, source.blocks)
    found = opened.copy([7, 1], [2, 8], 5)
    assert torch.equal(_rows(target), expected)
    assert found == producer.digests([7, 1], 5) == consumer.digests([2, 8], 5)
    assert found != producer.digests([7, 1], 6)
    assert all(0 <= digest < 2**64 for digest in found)
    opened.close()


@on_cpu
def test_what_the_producer_writes_later_is_seen() -> None:
    source, target = _pool(torch.int8, _CPU, shared=True), _pool(torch.int8, _CPU)
    producer = _blocks(source)
    producer.export()
    opened = _blocks(target).open(producer.handle, source.blocks)
    source.storage[3].zero_()
    opened.copy([3], [0], 0)
    assert not target.storage[0].any()


@on_cpu
@pytest.mark.parametrize("block", [-1, 9])
def test_a_block_outside_the_producer_s_pool_is_refused(block: int) -> None:
    source, target = _pool(torch.int8, _CPU, shared=True), _pool(torch.int8, _CPU)
    producer = _blocks(source)
    producer.export()
    before = _rows(target).clone()
    opened = _blocks(target).open(producer.handle, source.blocks)
    with pytest.raises(ValueError, match="outside the producer's pool"):
        opened.copy([block], [0], 0)
    assert torch.equal(_rows(target), before)


def test_memory_that_kernels_cannot_read_is_closed_and_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Memory:
        """Opens what cannot be read."""

        closed = 0

        def open(self, handle: bytes, size: int) -> Opened:
            return Opened(torch.zeros(size, dtype=torch.uint8), self.close)

        def close(self) -> None:
            self.closed += 1

    def refused(*arguments: Any) -> None:
        raise RuntimeError("no such address")

    memory = Memory()
    blocks = _blocks(_pool(torch.int8, _CPU), memory)
    monkeypatch.setattr("engine.gpu.device_blocks.digests", refused)
    with pytest.raises(OSError, match="kernels cannot read: no such address"):
        blocks.open(b"", 9)
    assert memory.closed == 1


def test_memory_that_is_not_shared_has_no_handle() -> None:
    with pytest.raises(OSError, match="memory of no file"):
        _blocks(_pool(torch.int8, _CPU)).export()


def test_a_handle_of_too_little_or_of_nothing_is_refused() -> None:
    source, target = _pool(torch.int8, _CPU, shared=True), _pool(torch.int8, _CPU)
    producer, consumer = _blocks(source), _blocks(target)
    producer.export()
    with pytest.raises(ValueError, match="bytes of memory where"):
        consumer.open(producer.handle, source.blocks + 1)
    with pytest.raises(ValueError, match="invalid literal"):
        consumer.open(b"nonsense", 1)
    with pytest.raises(OSError, match="No such file"):
        consumer.open(f"{os.getpid()} 999999 0 {source.blocks * source.block_bytes}".encode(), 9)


def test_what_is_in_host_memory_is_not_brought_there_again_until_a_pass_writes_to_it() -> None:
    saved: list[list[int]] = []
    blocks = DeviceBlocks(_pool(torch.int8, _CPU).storage, HostMemory(), saved.append)
    blocks.save([3, 4, 5, 6])
    blocks.save([3, 4, 5, 6, 7])
    plans = []

    class Runs:
        """An executor of blocks of four tokens."""

        capacity = SimpleNamespace(block_size=4)

        def execute(self, plan: Any) -> str:
            plans.append(plan)
            return "result"

    sequence = SimpleNamespace(blocks=[3, 4, 5, 6])
    chunk = SimpleNamespace(sequence=sequence, start=5, length=5)  # in its second and third block
    runs = SettledExecutor(Runs(), blocks)  # type: ignore[arg-type]
    plan: Any = SimpleNamespace(chunks=(chunk,))
    assert runs.execute(plan) == "result"
    assert plans == [plan]
    blocks.save([3, 4, 5, 6])
    assert saved == [[3, 4, 5, 6], [7], [4, 5]]


@contextmanager
def _as_a_device(monkeypatch: pytest.MonkeyPatch, pool: KvPool) -> Iterator[Any]:
    """An executor over a pool that counts as a device's."""
    monkeypatch.setattr(host_blocks, "_on_host", lambda pool: False)
    yield SimpleNamespace(pool=pool, staging=None)


def test_a_producer_that_cannot_share_its_device_saves_every_block(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with _as_a_device(monkeypatch, _pool(torch.int8, _CPU)) as executor:
        runs, store = host_blocks.to_publish(executor, lambda size: memoryview(bytearray(size)))
    assert isinstance(runs, SavingExecutor)
    assert host_blocks.on_device(store) is None
    assert "KV goes by way of host memory" in caplog.text


@on_cpu
def test_a_producer_that_shares_its_device_saves_on_demand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = _pool(torch.int8, _CPU, shared=True)
    with _as_a_device(monkeypatch, pool) as executor:
        runs, store = host_blocks.to_publish(executor, lambda size: memoryview(bytearray(size)))
    assert isinstance(runs, SettledExecutor)
    device = host_blocks.on_device(store)
    assert device is not None
    assert device.handle
    device.save([4])
    assert bytes(store.block(4)) == bytes(_rows(pool)[4].numpy())
    assert not any(store.block(5))


@on_cpu
def test_a_consumer_needs_no_memory_that_others_see(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = _pool(torch.int8, _CPU)
    with _as_a_device(monkeypatch, pool) as executor:
        store = host_blocks.to_fill(executor)
    assert isinstance(store, Staging)
    assert host_blocks.on_device(store) is not None
    assert host_blocks.on_device(pool) is None


async def test_a_settled_consumer_is_the_consumer_after_the_passes() -> None:
    class Pulls:
        """A hand-off without a network."""

        async def pull(self, ref: Any, into: Any, skip: int = 0) -> Any:
            return ref, into, skip

    assert await SettledConsumer[Any, Any](Pulls(), _CPU).pull("ref", [1], 2) == ("ref", [1], 2)


# On GPUs, between processes: a process cannot open what it exports itself.

_PRODUCER = """
import sys
import torch
from engine.gpu.device_blocks import DeviceBlocks
from engine.gpu.shared_memory import memory_of

device = torch.device("cuda", int(sys.argv[1]))
torch.cuda.set_device(device)
storage = torch.empty(int(sys.argv[2]), int(sys.argv[3]), dtype=torch.uint8, device=device)
storage.random_(0, 255, generator=torch.Generator(device).manual_seed(7))
blocks = DeviceBlocks(storage, memory_of(device), print)
blocks.export()
print(blocks.handle.hex(), flush=True)
for line in sys.stdin:
    numbers = [int(number) for number in line.split()]
    print(*blocks.digests(numbers, 0), flush=True)
"""


class Producer:
    """A process with a pool of [blocks, size] random bytes on a GPU."""

    def __init__(self, index: int, blocks: int, size: int) -> None:
        arguments = [sys.executable, "-c", _PRODUCER, str(index), str(blocks), str(size)]
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.handle = bytes.fromhex(self._answer())

    def digests(self, blocks: list[int]) -> list[int]:
        """Those of its blocks, from position 0 on."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, blocks)) + "\n")
        self.process.stdin.flush()
        return [int(digest) for digest in self._answer().split()]

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture
def producer(request: pytest.FixtureRequest) -> Iterator[Producer]:
    """On the GPU whose number is the parameter."""
    if request.param >= torch.cuda.device_count():
        pytest.skip(f"there is no GPU {request.param}")
    made = Producer(request.param, 40, 2**18)
    yield made
    made.process.kill()
    made.process.communicate()


def _random(index: int) -> torch.Tensor:
    """What the producer has."""
    generator = torch.Generator(torch.device("cuda", index)).manual_seed(7)
    made = torch.empty(40, 2**18, dtype=torch.uint8, device=torch.device("cuda", index))
    return made.random_(0, 255, generator=generator)


@pytest.mark.gpu
@pytest.mark.parametrize("producer", [0, 1], indirect=True)
def test_blocks_go_from_gpu_to_gpu(producer: Producer, request: pytest.FixtureRequest) -> None:
    index = request.node.callspec.params["producer"]
    device = torch.device("cuda", 0)
    target = torch.zeros(50, 2**18, dtype=torch.uint8, device=device)
    consumer = DeviceBlocks(target, memory_of(device), print)
    sources, into = [39, 0, 17, 18], [1, 49, 20, 3]
    for _ in range(2):  # it can be opened again
        opened = consumer.open(producer.handle, 40)
        assert opened.copy(sources, into, 0) == producer.digests(sources)
        opened.close()
    expected = torch.zeros_like(target)
    expected[into] = _random(index)[sources].to(device)
    assert torch.equal(target, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("producer", [0], indirect=True)
def test_memory_stays_readable_until_it_is_closed_whatever_becomes_of_the_producer(
    producer: Producer,
) -> None:
    device = torch.device("cuda", 0)
    target = torch.zeros(40, 2**18, dtype=torch.uint8, device=device)
    opened = DeviceBlocks(target, memory_of(device), print).open(producer.handle, 40)
    producer.process.kill()
    producer.process.wait()
    opened.copy(list(range(40)), list(range(40)), 0)
    opened.close()
    assert torch.equal(target, _random(0))


@pytest.mark.gpu
@pytest.mark.parametrize("producer", [0], indirect=True)
async def test_a_pull_waits_for_the_passes_and_not_for_those_that_come_later(
    producer: Producer,
) -> None:
    device = torch.device("cuda", 0)
    target = torch.zeros(40, 2**18, dtype=torch.uint8, device=device)
    blocks = DeviceBlocks(target, memory_of(device), print)
    opened = blocks.open(producer.handle, 40)
    opened.copy([1], [0], 0)  # compiled
    guess = torch.cuda.Event()  # type: ignore[no-untyped-call]
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    target[1].fill_(9)  # a pass that writes into the block, which is free already
    guess.record()
    over_before_the_copy = []

    class Pulls:
        """Copies one block."""

        async def pull(self, ref: Any, into: Any, skip: int = 0) -> Any:
            over_before_the_copy.append(guess.query())
            torch.cuda._sleep(2_000_000_000)  # type: ignore[no-untyped-call]
            later = torch.cuda.default_stream(device).record_event()
            await asyncio.to_thread(opened.copy, [5], into, 0)
            over_before_the_copy.append(later.query())

    await SettledConsumer[Any, Any](Pulls(), device).pull(None, [1])
    assert over_before_the_copy == [True, False]
    assert torch.equal(target[1], _random(0)[5])
    torch.cuda.synchronize()
    opened.close()


@pytest.mark.gpu
def test_a_gpu_that_is_not_seen_and_expandable_segments_are_refused() -> None:
    device = torch.device("cuda", 0)
    memory = memory_of(device)
    tensor = torch.zeros(2**22, dtype=torch.uint8, device=device)
    handle = bytearray(memory.export(tensor))
    handle[:4] = b"none"
    with pytest.raises(OSError, match="not visible"):
        memory.open(bytes(handle), 2**22)
    with pytest.raises(ValueError, match="unpack requires"):
        memory.open(b"short", 1)
    with pytest.raises(OSError, match="cuIpcOpenMemHandle"):
        memory.open(memory.export(tensor), 2**22)  # of this very process
    script = (
        "import torch; from engine.gpu.shared_memory import memory_of\n"
        "d = torch.device('cuda', 0); t = torch.zeros(2**26, device=d)\n"
        "try: memory_of(d).export(t)\n"
        "except OSError as error: print('refused', error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "refused" in answer.stdout


def test_host_memory_of_a_process_that_has_gone_is_refused() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    with pytest.raises(OSError, match="No such file"):
        HostMemory().open(ended.stdout.strip() + b" 3 0 4096", 4096)
