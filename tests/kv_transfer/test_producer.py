"""The producer's own promises to the prefill worker."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest

from baton.errors import KvTransferError
from kv_transfer.producer import LeaseProducer
from kv_transfer.shm import allocate
from kv_transfer.store import BufferStore


@pytest.fixture
def transport() -> str:
    """The transport does not matter here."""
    return "memory"


async def news(producer: LeaseProducer, lease_id: bytes):
    return [final async for final in producer.follow(lease_id)]


@pytest.mark.parametrize("blocks", [[], [64], [-1]])
async def test_a_lease_needs_blocks_of_the_pool(pair, blocks):
    with pytest.raises(ValueError, match="blocks of the pool"):
        pair.producer.publish(blocks, 1)


async def test_more_ready_blocks_than_leased_is_a_bug(pair):
    ref = pair.publish(range(4), sealed=False)
    with pytest.raises(ValueError, match="5 blocks ready of 4"):
        pair.producer.advance(ref.lease_id, 5)


async def test_calls_after_the_end_and_for_unknown_leases_are_ignored(pair, until):
    ref = pair.publish(range(4), sealed=False)
    pair.producer.revoke(ref.lease_id)
    for lease_id in (ref.lease_id, bytes(16)):
        pair.producer.advance(lease_id, 2)
        pair.producer.seal(lease_id)
        pair.producer.revoke(lease_id)
    await until(lambda: pair.freed)
    assert pair.freed == [ref.lease_id]


async def test_advance_may_go_back_and_repeat_without_effect(pair):
    ref = pair.publish(range(4), sealed=False)
    for ready in (2, 1, 2, 0, 3):
        pair.producer.advance(ref.lease_id, ready)
    pair.producer.seal(ref.lease_id)
    pair.producer.seal(ref.lease_id)
    told = await news(pair.producer, ref.lease_id)
    assert [block for final in told for block in final.blocks] == [0, 1, 2, 3]
    assert [final.first for final in told] == [0, *[len(told[0].blocks)] * (len(told) > 1)]
    assert [final.sealed for final in told][-1:] == [True]


async def test_digests_in_the_thread_keep_order_with_those_on_the_loop(pair):
    ref = pair.publish(range(60), sealed=False)
    for ready in (1, 30, 31, 59):
        pair.producer.advance(ref.lease_id, ready)
    pair.producer.seal(ref.lease_id)
    await pair.consumer.pull(ref, range(60))
    assert pair.copied(range(60), range(60))


async def test_blocks_are_not_freed_while_the_digest_thread_reads_them(pair, monkeypatch, until):
    started = asyncio.Event()
    loop = asyncio.get_running_loop()
    digests = pair.producer._digester._digests

    def slow(kind, blocks, first):
        loop.call_soon_threadsafe(started.set)
        time.sleep(0.2)
        return digests(kind, blocks, first)

    monkeypatch.setattr(pair.producer._digester, "_digests", slow)
    ref = pair.publish(range(60))
    await started.wait()
    pair.producer.revoke(ref.lease_id)
    await asyncio.sleep(0.05)
    assert (pair.freed, pair.producer.leased_blocks) == ([], 60)
    await until(lambda: pair.freed == [ref.lease_id])


async def test_digests_that_fail_revoke_the_lease(pair, monkeypatch, until, caplog):
    def broken(kind, blocks, first):
        raise ValueError("no such memory")

    monkeypatch.setattr(pair.producer._digester, "_digests", broken)
    ref = pair.publish(range(60))
    await until(lambda: pair.freed == [ref.lease_id])
    with pytest.raises(KvTransferError, match="revoked"):
        await news(pair.producer, ref.lease_id)
    assert "digests of a lease failed" in caplog.text


async def test_on_freed_is_never_called_from_inside_a_method(pair):
    ref = pair.publish(range(4))
    pair.producer.revoke(ref.lease_id)
    assert pair.freed == []
    await asyncio.sleep(0)
    assert pair.freed == [ref.lease_id]


async def test_a_pool_that_cannot_be_shared_as_it_lies_is_refused(layout):
    shared = allocate(2 * layout.block_bytes)
    elsewhere = BufferStore(bytearray(2 * layout.block_bytes), layout.block_bytes)
    with pytest.raises(ValueError, match="shared memory"):
        LeaseProducer(elsewhere, layout, control_address="", on_freed=print, shared=shared)
    wrong = dataclasses.replace(layout, layers=1)
    with pytest.raises(ValueError, match="layout"):
        LeaseProducer(elsewhere, wrong, control_address="", on_freed=print)
    shared.close()


async def test_every_incarnation_has_an_id_of_its_own(pair, layout):
    other = LeaseProducer(pair.source, layout, control_address="", on_freed=print)
    assert other.engine_id != pair.producer.engine_id
    await other.close()


@pytest.mark.parametrize(
    ("data_address", "told"), [("0.0.0.0:0", "kv.example"), ("127.0.0.1:0", "127.0.0.1")]
)
async def test_consumers_are_told_a_host_that_they_can_reach(layout, pair, data_address, told):
    producer = LeaseProducer(
        pair.source,
        layout,
        control_address="kv.example:50061",
        on_freed=print,
        data_address=data_address,
    )
    (endpoint,) = producer.connect(1, layout.digest, "").endpoints
    assert endpoint.transport == "tcp"
    assert endpoint.address.rpartition(":")[0] == told
    await producer.close()
