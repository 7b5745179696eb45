"""What every transport must do when things go wrong: an error in time, never wrong KV, quiet."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

import kv_transfer.transport
from baton.errors import KvTransferError
from engine.gpu.device_blocks import OpenedBlocks


@pytest.fixture
def slow_landing(monkeypatch):
    """Every block takes 20 ms to verify, so that a pull can be met in its middle."""
    digest = kv_transfer.transport.block_digest

    def slow(block, position):
        time.sleep(0.02)
        return digest(block, position)

    monkeypatch.setattr(kv_transfer.transport, "block_digest", slow)
    copy = OpenedBlocks.copy

    def slow_copy(self, sources, into, first):
        time.sleep(0.02 * len(sources))
        return copy(self, sources, into, first)

    monkeypatch.setattr(OpenedBlocks, "copy", slow_copy)


async def assert_quiet(pair, seconds: float = 0.3) -> None:
    """Nothing writes into the consumer's pool any more."""
    pair.poison()
    await asyncio.sleep(seconds)
    assert all(pair.poisoned(i) for i in range(pair.target.blocks))


async def test_a_bit_flipped_after_the_digest_is_found(pair, until):
    ref = pair.publish(range(10))
    await until(lambda: pair.digested(ref))
    pair.flip_bit(7)
    with pytest.raises(KvTransferError, match="digest mismatch in block 7"):
        await pair.consumer.pull(ref, range(10))
    await assert_quiet(pair, 0.1)
    await until(lambda: pair.freed == [ref.lease_id])


async def test_blocks_swapped_in_the_pool_are_found(pair, until):
    ref = pair.publish([0, 1])
    await until(lambda: pair.digested(ref))
    first = bytes(pair.source.block(0))
    pair.source.block(0)[:] = pair.source.block(1)
    pair.source.block(1)[:] = first
    with pytest.raises(KvTransferError, match="digest mismatch"):
        await pair.consumer.pull(ref, [0, 1])


async def test_a_lease_that_nobody_follows_expires_on_the_timer(make_pair, until):
    pair = await make_pair(producer={"time_to_live": 0.2})
    ref = pair.publish(range(4), sealed=False)
    await until(lambda: pair.freed == [ref.lease_id], 2.0)
    assert pair.producer.leased_blocks == 0


async def test_a_pull_keeps_its_lease_alive_while_prefill_goes_on(make_pair, until):
    pair = await make_pair(producer={"time_to_live": 0.4})
    await pair.consumer.pull(pair.publish([5]), [5])  # connects, which may take longer than that
    ref = pair.publish(range(4), sealed=False)
    pull = asyncio.create_task(pair.consumer.pull(ref, range(4)))
    await asyncio.sleep(1.2)
    pair.producer.seal(ref.lease_id)
    await pull
    assert pair.copied(range(4), range(4))


async def test_the_cap_on_a_lease_s_age_ends_a_pull(make_pair, until):
    pair = await make_pair(producer={"time_to_live": 0.3, "max_age": 0.5})
    ref = pair.publish(range(4), sealed=False)
    pair.producer.advance(ref.lease_id, 2)
    with pytest.raises(KvTransferError, match="lease"):
        async with asyncio.timeout(5):
            await pair.consumer.pull(ref, range(4))
    await until(lambda: pair.freed == [ref.lease_id])


async def test_a_lease_that_ends_before_the_release_makes_the_copy_invalid(pair, monkeypatch):
    ref = pair.publish(range(4))
    release = pair.producer.release

    def too_late(lease_id, *, committed):
        pair.clock.ahead += 1000.0
        return release(lease_id, committed=committed)

    monkeypatch.setattr(pair.producer, "release", too_late)
    with pytest.raises(KvTransferError, match="gone before the copy was complete"):
        await pair.consumer.pull(ref, range(4))
    assert pair.copied(range(4), range(4))  # whole, and refused all the same


async def test_blocks_reused_after_expiry_never_pass(pair, slow_landing):
    ref = pair.publish(range(16))
    pull = asyncio.create_task(pair.consumer.pull(ref, range(16)))
    await asyncio.sleep(0.1)
    pair.clock.ahead += 1000.0
    pair.source_bytes[:] = 0
    with pytest.raises(KvTransferError):
        await pull


@pytest.mark.parametrize("ready", [0, 5])
async def test_a_revoked_lease_ends_its_pull_at_once(pair, until, ready):
    ref = pair.publish(range(10), sealed=False)
    pair.producer.advance(ref.lease_id, ready)
    pull = asyncio.create_task(pair.consumer.pull(ref, range(10)))
    await until(lambda: pair.copied(range(ready), range(ready)))
    started = time.monotonic()
    pair.producer.revoke(ref.lease_id)
    pair.producer.revoke(ref.lease_id)
    with pytest.raises(KvTransferError):
        await pull
    assert time.monotonic() - started < 1.0
    await until(lambda: pair.freed == [ref.lease_id])
    await assert_quiet(pair, 0.1)


async def test_a_cancelled_pull_is_quiet_when_it_ends_and_frees_the_source(
    pair, slow_landing, until
):
    pair.network.faults.late = 0.1
    ref = pair.publish(range(60))
    pull = asyncio.create_task(pair.consumer.pull(ref, range(60)))
    await until(lambda: not pair.poisoned(1))
    pull.cancel()
    await asyncio.sleep(0)
    pull.cancel()  # an impatient caller changes nothing
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert not pair.copied(range(60), range(60))  # it was met in its middle
    await assert_quiet(pair)
    await until(lambda: pair.freed == [ref.lease_id])


@pytest.mark.parametrize("transport", ["shm", "tcp"])  # memory has no threads; see test_memory
async def test_a_cancelled_pull_ends_only_after_its_thread(pair, monkeypatch, until):
    entered, leave = threading.Event(), threading.Event()
    digest = kv_transfer.transport.block_digest

    def held(block, position):
        if position == 3:
            entered.set()
            leave.wait(10.0)
        return digest(block, position)

    monkeypatch.setattr(kv_transfer.transport, "block_digest", held)
    ref = pair.publish(range(60))
    pull = asyncio.create_task(pair.consumer.pull(ref, range(60)))
    await until(entered.is_set)
    for _ in range(3):
        pull.cancel()
        await asyncio.sleep(0.05)
    assert not pull.done()
    leave.set()
    with pytest.raises(asyncio.CancelledError):
        await pull
    await until(lambda: pair.freed == [ref.lease_id])


async def test_a_pull_cancelled_while_it_waits_frees_the_source(pair, until):
    ref = pair.publish(range(4), sealed=False)
    pair.producer.advance(ref.lease_id, 1)
    pull = asyncio.create_task(pair.consumer.pull(ref, range(4)))
    await until(lambda: pair.copied([0], [0]))  # the rest is waited for
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    await until(lambda: pair.freed == [ref.lease_id], 2.0)


async def test_a_restarted_producer_is_told_apart_and_served(pair):
    old = pair.publish(range(4))
    await pair.consumer.pull(pair.publish([9]), [9])
    address = pair.producer.control_address
    await pair.stop_producer()
    await pair.start_producer(address)
    fresh = pair.publish(range(8, 12))
    async with asyncio.timeout(10):
        with pytest.raises(KvTransferError):
            await pair.consumer.pull(old, range(4))
        await pair.consumer.pull(fresh, range(8, 12))
        with pytest.raises(KvTransferError, match="restarted"):
            await pair.consumer.pull(old, range(4))
        await pair.consumer.pull(pair.publish([1]), [1])
    assert pair.copied(range(8, 12), range(8, 12))


async def test_a_producer_that_is_not_there_is_an_error_in_time(make_pair):
    pair = await make_pair(consumer={"timeout": 1.0})
    ref = pair.publish(range(4))
    await pair.stop_producer()
    started = time.monotonic()
    with pytest.raises(KvTransferError):
        await pair.consumer.pull(ref, range(4))
    assert time.monotonic() - started < 3.0


async def test_closing_the_producer_ends_pulls_and_frees_every_block(pair, until):
    ref = pair.publish(range(4), sealed=False)
    pull = asyncio.create_task(pair.consumer.pull(ref, range(4)))
    await asyncio.sleep(0.1)
    await pair.producer.close()
    with pytest.raises(KvTransferError):
        async with asyncio.timeout(5):
            await pull
    assert pair.freed == [ref.lease_id]


async def test_the_same_lease_cannot_be_pulled_twice_at_once(pair):
    ref = pair.publish(range(4), sealed=False)
    pull = asyncio.create_task(pair.consumer.pull(ref, range(4)))
    await asyncio.sleep(0.05)
    with pytest.raises(KvTransferError, match="being pulled"):
        await pair.consumer.pull(ref, range(4, 8))
    pair.producer.seal(ref.lease_id)
    await pull


async def test_a_lease_that_was_committed_cannot_be_pulled_again(pair):
    ref = pair.publish(range(4))
    await pair.consumer.pull(ref, range(4))
    with pytest.raises(KvTransferError, match="released"):
        await pair.consumer.pull(ref, range(4))
