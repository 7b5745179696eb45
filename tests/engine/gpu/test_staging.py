"""KV goes from a device pool through host memory into another one, and generation goes on."""

from __future__ import annotations

import asyncio
import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from engine.gpu.staging import Staging
from engine.model.pool import KvGeometry, KvPool
from engine.staged import SavingExecutor, StagedConsumer, finished_blocks
from scheduling.plan import Chunk, StepPlan
from tests.engine.gpu.test_executor import on_gpu, prompt, small

__all__ = ["on_gpu", "small"]

Make = Callable[..., Any]


@dataclass
class Report:
    """Of a pull."""

    on_device: bool


@pytest.fixture(params=[torch.float32, torch.int8], ids=["float32", "int8"])
def pool(request: pytest.FixtureRequest, device: torch.device) -> KvPool:
    """Nine blocks of random bytes."""
    made = KvPool(KvGeometry.of("", 2, 1, 16, request.param, 4), 9, device=device)
    made.storage.view(torch.uint8).random_(0, 255)
    return made


def bytes_of(pool: KvPool, block: int) -> bytes:
    """A block on the device."""
    return bytes(pool.storage[block].cpu().view(-1).view(torch.uint8).numpy())


def test_saved_blocks_are_on_the_host_and_others_are_not(pool: KvPool) -> None:
    staging = Staging(pool)
    staging.save([7, 0, 3])
    for block in range(pool.blocks):
        saved = block in (7, 0, 3)
        assert bytes(staging.block(block)) == (
            bytes_of(pool, block) if saved else bytes(pool.block_bytes)
        )


def test_loaded_blocks_are_on_the_device_and_others_are_as_before(pool: KvPool) -> None:
    staging = Staging(pool)
    before = [bytes_of(pool, block) for block in range(pool.blocks)]
    for block in range(pool.blocks):
        staging.block(block)[:] = bytes([block]) * pool.block_bytes
    staging.load([8, 2])
    for block in range(pool.blocks):
        loaded = block in (8, 2)
        wanted = bytes([block]) * pool.block_bytes if loaded else before[block]
        assert bytes_of(pool, block) == wanted


def test_a_consumers_host_memory_is_given_back_beyond_what_is_kept(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = KvPool(KvGeometry.of("", 4, 2, 64, torch.float32, 16), 6, device=device)
    assert pool.block_bytes % mmap.PAGESIZE == 0
    monkeypatch.setattr("engine.gpu.staging._KEPT_BYTES", 2 * pool.block_bytes)
    staging = Staging(pool)
    for _ in range(2):
        for block in (5, 1, 3, 0):
            staging.block(block)[:] = bytes([7 + block]) * pool.block_bytes
        staging.load([5, 1, 3, 0])
        for block in (5, 1, 3, 0):
            assert bytes_of(pool, block) == bytes([7 + block]) * pool.block_bytes
        kept = [block for block in range(6) if any(staging.block(block))]
        assert kept == [1, 5]


def test_what_others_may_map_keeps_its_memory(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = KvPool(KvGeometry.of("", 4, 2, 64, torch.float32, 16), 2, device=device)
    monkeypatch.setattr("engine.gpu.staging._KEPT_BYTES", 0)
    staging = Staging(pool, mmap.mmap(-1, 2 * pool.block_bytes))
    staging.block(1)[:] = bytes([9]) * pool.block_bytes
    staging.load([1])
    assert bytes(staging.block(1)) == bytes([9]) * pool.block_bytes


def test_more_blocks_than_the_buffer_holds_go_in_pieces(
    pool: KvPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.gpu.staging._BUFFER_BYTES", 2 * pool.block_bytes)
    staging = Staging(pool)
    order = [4, 1, 8, 0, 6]
    staging.save(order)
    assert [bytes(staging.block(block)) for block in order] == [bytes_of(pool, b) for b in order]


def test_a_block_out_of_range_is_refused(pool: KvPool) -> None:
    with pytest.raises(IndexError, match="block 9 of a pool of 9"):
        Staging(pool).block(9)


def test_finished_are_full_blocks_and_the_last_of_a_complete_prompt(
    drive: Make, small: Any
) -> None:
    driver = drive(small.path, block_size=4)
    half, whole = driver.add(prompt(11), 2), driver.add(prompt(6, 2), 2)
    half.blocks, whole.blocks = [5, 6, 7], [8, 9]
    begun = StepPlan((Chunk(half, 0, 9, sample=False), Chunk(whole, 0, 6, sample=True)))
    assert finished_blocks(begun, 4) == [5, 6, 8, 9]
    assert finished_blocks(StepPlan((Chunk(half, 9, 2, sample=True),)), 4) == [7]


def test_a_sequence_goes_on_from_what_another_worker_saved(small: Any, on_gpu: Make) -> None:
    text = prompt(11)
    prefill, decode = on_gpu(small.path, block_size=4), on_gpu(small.path, block_size=4)
    source, target = (Staging(each.executor.pool) for each in (prefill, decode))
    prefill.executor = SavingExecutor(prefill.executor, source)
    first = prefill.add(text, 2)
    prefill.step()
    second = decode.add(text, 5)
    second.blocks = [decode.free.pop() for _ in first.blocks]

    class Pulls:
        """A hand-off without a network."""

        async def pull(self, ref: Any, into: Any, skip: int = 0) -> Report:
            for block, at in zip(ref.blocks, into, strict=True):
                target.block(at)[:] = source.block(block)
            return Report(on_device=False)

    consumer = StagedConsumer(Pulls(), target)
    assert not asyncio.run(consumer.pull(first, second.blocks)).on_device
    second.computed = len(text)
    second.append(first.tokens[-1])
    decode.run()
    small.assert_generates(text, second.tokens[len(text) :])


async def test_blocks_that_came_to_the_device_are_not_loaded(pool: KvPool) -> None:
    staging, before = Staging(pool), pool.storage.clone()

    class Pulls:
        """Brings blocks past the host."""

        async def pull(self, ref: Any, into: Any, skip: int = 0) -> Report:
            return Report(on_device=True)

    assert (await StagedConsumer(Pulls(), staging).pull(None, [1])).on_device
    assert torch.equal(pool.storage.view(torch.uint8), before.view(torch.uint8))


async def test_a_cancelled_pull_ends_when_nothing_is_written_any_more(pool: KvPool) -> None:
    staging, going, ended = Staging(pool), threading.Event(), threading.Event()

    def load(blocks: Any) -> None:
        going.wait(10)
        ended.set()

    staging.load = load  # type: ignore[method-assign]

    class Pulls:
        """Brings nothing."""

        async def pull(self, ref: Any, into: Any, skip: int = 0) -> Report:
            return Report(on_device=False)

    pulling = asyncio.create_task(StagedConsumer(Pulls(), staging).pull(None, [1]))
    await asyncio.sleep(0.05)
    pulling.cancel()
    await asyncio.sleep(0.05)
    assert not pulling.done()
    going.set()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    assert ended.is_set()
