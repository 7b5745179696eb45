"""What every transport must do: bytes arrive whole, early and only where they belong."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from pathlib import Path

import pytest

from baton.errors import KvTransferError, Overloaded


async def test_blocks_arrive_and_the_lease_is_freed_once(pair, until):
    blocks, into = list(range(12)), list(range(20, 32))
    ref = pair.publish(blocks)
    report = await pair.consumer.pull(ref, into)
    assert pair.copied(blocks, into)
    assert report.transport == pair.transport
    assert report.bytes == 12 * pair.source.block_bytes
    await until(lambda: pair.freed)
    await asyncio.sleep(0.05)
    assert pair.freed == [ref.lease_id]
    assert pair.producer.leased_blocks == pair.producer.live_leases == 0


async def test_blocks_move_before_the_seal(pair, until):
    blocks, into = list(range(10)), list(range(30, 40))
    ref = pair.publish(blocks, sealed=False)
    pull = asyncio.create_task(pair.consumer.pull(ref, into))
    for ready in (1, 3, 9):
        pair.producer.advance(ref.lease_id, ready)
        await until(lambda ready=ready: pair.copied(blocks[:ready], into[:ready]))
        assert all(pair.poisoned(i) for i in into[ready:])
        assert not pull.done()
    pair.producer.seal(ref.lease_id)
    await pull
    assert pair.copied(blocks, into)


async def test_blocks_that_become_final_later_may_still_change_until_then(pair, until):
    ref = pair.publish([0, 1], sealed=False)
    pair.producer.advance(ref.lease_id, 1)
    pull = asyncio.create_task(pair.consumer.pull(ref, [0, 1]))
    await until(lambda: pair.copied([0], [0]))
    pair.source.block(1)[:] = bytes(pair.source.block_bytes)
    pair.producer.seal(ref.lease_id)
    await pull
    assert pair.copied([1], [1])


async def test_scattered_blocks_keep_their_order_and_touch_nothing_else(pair):
    numbers = random.Random(3)
    blocks, into = numbers.sample(range(64), 40), numbers.sample(range(64), 40)
    await pair.consumer.pull(pair.publish(blocks), into)
    assert pair.copied(blocks, into)
    assert all(pair.poisoned(i) for i in set(range(64)) - set(into))


@pytest.mark.parametrize("skip", [1, 5, 9])
async def test_blocks_that_the_consumer_has_are_not_moved(make_pair, until, skip):
    pair = await make_pair(consumer={"slice_bytes": 3 * 65536})
    blocks, into = list(range(10)), list(range(30, 40 - skip))
    ref = pair.publish(blocks, sealed=False)
    pull = asyncio.create_task(pair.consumer.pull(ref, into, skip))
    for ready in (2, 7):
        pair.producer.advance(ref.lease_id, ready)
        landed = max(0, ready - skip)
        await until(lambda n=landed: pair.copied(blocks[skip : skip + n], into[:n]))
        assert all(pair.poisoned(i) for i in into[landed:])
    pair.producer.seal(ref.lease_id)
    report = await pull
    assert pair.copied(blocks[skip:], into)
    assert all(pair.poisoned(i) for i in set(range(64)) - set(into))
    assert report.bytes == (10 - skip) * pair.source.block_bytes
    await until(lambda: pair.freed == [ref.lease_id])


async def test_a_run_is_cut_into_slices(make_pair):
    pair = await make_pair(consumer={"slice_bytes": 3 * 65536, "max_inflight_bytes": 1})
    blocks = list(range(20))
    await pair.consumer.pull(pair.publish(blocks), blocks[::-1])
    assert pair.copied(blocks, blocks[::-1])


async def test_concurrent_pulls_share_nothing(pair, until):
    order = list(range(64))
    random.Random(5).shuffle(order)
    parts = [order[i : i + 4] for i in range(0, 64, 4)]
    refs = [pair.publish(part) for part in parts]
    assert len({ref.lease_id for ref in refs}) == len(refs)
    await asyncio.gather(*(pair.consumer.pull(r, p) for r, p in zip(refs, parts, strict=True)))
    assert pair.copied(order, order)
    await until(lambda: len(pair.freed) == len(refs))
    assert pair.producer.leased_blocks == 0


async def test_a_failed_pull_harms_no_other(pair, until):
    good, bad = pair.publish(range(8)), pair.publish(range(8, 16))
    await until(lambda: pair.digested(bad))
    pair.flip_bit(12)
    results = await asyncio.gather(
        pair.consumer.pull(good, range(8)),
        pair.consumer.pull(bad, range(8, 16)),
        return_exceptions=True,
    )
    assert isinstance(results[1], KvTransferError)
    assert pair.copied(range(8), range(8)), results[0]


async def test_leases_beyond_the_cap_are_refused_until_others_are_freed(make_pair):
    pair = await make_pair(producer={"max_leased_blocks": 10})
    ref = pair.publish(range(8))
    with pytest.raises(Overloaded):
        pair.publish(range(8, 11))
    await pair.consumer.pull(ref, range(8))
    assert pair.publish(range(8, 18))


async def test_two_hundred_transfers_leak_nothing(pair, until):
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    for _ in range(3):
        await pair.consumer.pull(pair.publish([1, 2]), [3, 4])
    before, threads_before = descriptors(), threads()
    for i in range(200):
        ref = pair.publish([i % 64, (i + 7) % 64], sealed=i % 3 > 0)
        if i % 3:
            await pair.consumer.pull(ref, [1, 2])
            continue
        pull = asyncio.create_task(pair.consumer.pull(ref, [1, 2]))
        await asyncio.sleep(0)
        pull.cancel()
        await asyncio.gather(pull, return_exceptions=True)
        pair.producer.revoke(ref.lease_id)
    await until(lambda: len(pair.freed) == 203)
    assert pair.producer.leased_blocks == pair.producer.live_leases == 0
    await until(lambda: descriptors() <= before + 1)
    assert threads() < threads_before + 50  # pools fill up, and stay


async def test_a_reference_that_does_not_fit_is_refused_before_any_byte_moves(pair):
    ref = pair.publish(range(4))
    for wrong, into, skip in (
        (dataclasses.replace(ref, layout_digest="other"), range(4), 0),
        (ref, range(3), 0),
        (ref, [1, 2, 3, 3], 0),
        (ref, range(4), 1),
        (ref, range(0), 4),
        (ref, range(5), -1),
        (dataclasses.replace(ref, lease_id=bytes(16)), range(4), 0),
        (dataclasses.replace(ref, engine_id="another"), range(4), 0),
        (dataclasses.replace(ref, blocks=3), range(3), 0),
        (dataclasses.replace(ref, blocks=5), range(5), 0),
    ):
        with pytest.raises(KvTransferError):
            await pair.consumer.pull(wrong, into, skip)
