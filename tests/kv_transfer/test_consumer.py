"""The consumer against producers that lie, and how it shares and drops connections."""

from __future__ import annotations

import asyncio

import pytest

import kv_transfer.links
from baton.errors import KvTransferError
from baton.types import KvRef
from kv_transfer.consumer import PullConsumer
from kv_transfer.digest import block_digest
from kv_transfer.producer import FinalBlocks
from kv_transfer.store import BufferStore
from kv_transfer.transport import PeerLost


class ScriptedPeer:
    """A producer that tells what the test says; its blocks are zeros."""

    engine_id = "scripted"
    pool_blocks = 64
    transport = "scripted"

    def __init__(self, told: list[FinalBlocks], size: int) -> None:
        self.told = told
        self.size = size
        self.renewed: list[list[bytes]] = []
        self.released: list[bool] = []
        self.reading = self.most_reading = 0
        self.closed = False
        self.block_forever = False
        self.deaf = False
        self.skip_landing = False

    async def follow(self, lease_id):
        for final in self.told:
            yield final
        if self.block_forever:
            await asyncio.get_running_loop().create_future()

    async def renew(self, lease_ids):
        if self.deaf:
            await asyncio.get_running_loop().create_future()
        self.renewed.append(list(lease_ids))
        return [1.0] * len(lease_ids)

    async def release(self, lease_id, *, committed):
        self.released.append(committed)
        return committed

    async def read(self, run):
        self.reading += 1
        self.most_reading = max(self.most_reading, self.reading)
        await asyncio.sleep(0.01)
        for index, target in enumerate(run.targets):
            target[:] = 0
            if not self.skip_landing:
                run.land(index)
        self.reading -= 1

    async def close(self):
        self.closed = True


class ScriptedDialer:
    """Gives out one peer and counts."""

    def __init__(self, peer: ScriptedPeer) -> None:
        self.peer = peer
        self.dialed = 0

    async def dial(self, control_address):
        self.dialed += 1
        await asyncio.sleep(0.01)
        return self.peer


def final(first: int, blocks: list[int], size: int, *, sealed: bool = False) -> FinalBlocks:
    zeros = memoryview(bytes(size))
    digests = [block_digest(zeros, first + i) for i in range(len(blocks))]
    return FinalBlocks(first, tuple(blocks), tuple(digests), sealed)


@pytest.fixture
def peer(layout) -> ScriptedPeer:
    size = layout.block_bytes
    return ScriptedPeer([final(0, [0, 1, 2, 3], size, sealed=True)], size)


@pytest.fixture
def dialer(peer) -> ScriptedDialer:
    return ScriptedDialer(peer)


@pytest.fixture
def new_consumer(layout, dialer):
    def new(**options) -> PullConsumer:
        store = BufferStore(bytearray(64 * layout.block_bytes), layout.block_bytes)
        return PullConsumer(store, layout, dialer, **options)

    return new


@pytest.fixture
def ref(layout):
    def ref(number: int = 0, **changes) -> KvRef:
        fields = {
            "lease_id": bytes([number]) * 16,
            "control_address": "scripted:1",
            "engine_id": "scripted",
            "layout_digest": layout.digest,
            "blocks": 4,
            "tokens": 64,
            "time_to_live": 30.0,
        }
        return KvRef(**fields | changes)

    return ref


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([(1, [1, 2, 3], True)], "out of order"),
        ([(0, [0, 1], False), (1, [1, 2, 3], True)], "out of order"),
        ([(0, [0, 1, 2, 3, 4], True)], "out of order"),
        ([(0, [0, 1, 2, 64], True)], "outside its pool"),
        ([(0, [0, 1], True)], "2 of 4 blocks"),
        ([(0, [0, 1], False)], "2 of 4 blocks"),
        ([], "0 of 4 blocks"),
    ],
)
async def test_a_producer_that_lies_about_blocks_is_found(
    new_consumer, peer, ref, layout, told, message
):
    peer.told = [final(f, b, layout.block_bytes, sealed=s) for f, b, s in told]
    consumer = new_consumer()
    with pytest.raises(KvTransferError, match=message):
        await consumer.pull(ref(), range(4))
    await consumer.close()
    assert peer.released == [False]
    assert peer.closed


async def test_a_transport_that_lands_nothing_is_found(new_consumer, peer, ref):
    peer.skip_landing = True
    consumer = new_consumer()
    with pytest.raises(KvTransferError, match="blocks are missing"):
        await consumer.pull(ref(), range(4))
    await consumer.close()


async def test_pulls_share_one_connection_even_when_they_start_together(new_consumer, dialer, ref):
    consumer = new_consumer()
    pulls = [consumer.pull(ref(i), range(4 * i, 4 * i + 4)) for i in range(8)]
    await asyncio.gather(*pulls)
    await consumer.pull(ref(9), range(4))
    assert dialer.dialed == 1
    await consumer.close()


async def test_renewals_of_one_producer_go_together(new_consumer, peer, ref):
    peer.told, peer.block_forever = [], True
    consumer = new_consumer()
    pulls = [asyncio.create_task(consumer.pull(ref(i, time_to_live=0.6), range(4))) for i in (1, 2)]
    await asyncio.sleep(0.4)
    assert len(peer.renewed) in (2, 3)
    assert all(set(batch) == {bytes([1]) * 16, bytes([2]) * 16} for batch in peer.renewed)
    for pull in pulls:
        pull.cancel()
    await asyncio.gather(*pulls, return_exceptions=True)
    before = len(peer.renewed)
    await asyncio.sleep(0.2)
    assert len(peer.renewed) == before
    await consumer.close()


async def test_a_producer_that_renews_nothing_is_lost_and_dialed_anew(
    new_consumer, peer, dialer, ref, layout
):
    whole = peer.told
    peer.told, peer.block_forever, peer.deaf = [], True, True
    consumer = new_consumer(timeout=0.4)
    with pytest.raises(PeerLost, match="silent"):
        async with asyncio.timeout(3):
            await consumer.pull(ref(), range(4))
    peer.told, peer.block_forever = whole, False
    await consumer.pull(ref(1), range(4))
    assert dialer.dialed == 2
    await consumer.close()


@pytest.mark.parametrize("claimed", [0.0, -5.0, 1e-9])
async def test_a_claimed_time_to_live_of_nothing_does_not_spin(new_consumer, peer, ref, claimed):
    peer.told, peer.block_forever = [], True
    consumer = new_consumer()
    pull = asyncio.create_task(consumer.pull(ref(time_to_live=claimed), range(4)))
    await asyncio.sleep(0.2)
    assert 1 <= len(peer.renewed) <= 10
    pull.cancel()
    await asyncio.gather(pull, return_exceptions=True)
    await consumer.close()


async def test_bytes_under_way_are_bounded(new_consumer, peer, ref, layout):
    consumer = new_consumer(
        slice_bytes=layout.block_bytes, max_inflight_bytes=2 * layout.block_bytes
    )
    await asyncio.gather(*(consumer.pull(ref(i), range(4 * i, 4 * i + 4)) for i in range(6)))
    assert peer.most_reading == 2
    await consumer.close()


async def test_a_cancelled_first_pull_does_not_cancel_the_dial_for_others(new_consumer, ref):
    consumer = new_consumer()
    first = asyncio.create_task(consumer.pull(ref(1), range(4)))
    second = asyncio.create_task(consumer.pull(ref(2), range(4, 8)))
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert first.cancelled() or isinstance(
        (await asyncio.gather(first, return_exceptions=True))[0], asyncio.CancelledError
    )
    await consumer.close()


async def test_connections_that_nobody_uses_are_closed(new_consumer, peer, ref, monkeypatch):
    consumer = new_consumer()
    await consumer.pull(ref(), range(4))
    monkeypatch.setattr(kv_transfer.links, "_IDLE_SECONDS", -1.0)
    await consumer.pull(ref(control_address="scripted:2"), range(4))
    await asyncio.sleep(0)
    assert consumer._links.addresses == ["scripted:2"]
    assert peer.closed
    await consumer.close()


async def test_pulling_into_blocks_that_do_not_exist_is_a_bug(new_consumer, ref):
    consumer = new_consumer()
    with pytest.raises(ValueError, match="do not exist"):
        await consumer.pull(ref(), range(61, 65))
    await consumer.close()
