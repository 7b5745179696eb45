"""The in-process transport's faults, each of which the consumer must find."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import KvTransferError


@pytest.fixture
def transport() -> str:
    """Only memory can misbehave on demand."""
    return "memory"


@pytest.mark.parametrize(
    ("fault", "value", "message"),
    [
        ("flip_bit_of", {3}, "digest mismatch in block 3"),
        ("truncate", {5}, "digest mismatch in block 5"),
        ("swap", (1, 2), "digest mismatch in block 1"),
        ("drop", {4}, "reading blocks took"),
        ("die_before", 6, "connection broke"),
        ("frozen", True, "took more than"),
        ("lose_release", True, "answer was lost"),
    ],
)
async def test_a_fault_is_found_in_time_and_the_next_pull_works(
    make_pair, until, fault, value, message
):
    pair = await make_pair(consumer={"timeout": 0.5})
    harmless = getattr(pair.network.faults, fault)
    setattr(pair.network.faults, fault, value)
    ref = pair.publish(range(8))
    with pytest.raises(KvTransferError, match=message):
        async with asyncio.timeout(5):
            await pair.consumer.pull(ref, range(8))
    setattr(pair.network.faults, fault, harmless)
    await pair.consumer.pull(pair.publish(range(8)), range(8))
    assert pair.copied(range(8), range(8))


async def test_control_calls_that_arrive_twice_change_nothing(make_pair, until):
    pair = await make_pair(producer={"time_to_live": 0.3})
    pair.network.faults.duplicate = True
    ref = pair.publish(range(8), sealed=False)
    pull = asyncio.create_task(pair.consumer.pull(ref, range(8)))
    await asyncio.sleep(0.4)
    pair.producer.seal(ref.lease_id)
    await pull
    await until(lambda: pair.freed)
    assert pair.freed == [ref.lease_id]


async def test_a_slow_transport_is_not_a_dead_one(make_pair):
    pair = await make_pair(consumer={"timeout": 1.0, "slice_bytes": 1})
    pair.network.faults.delay = 0.3
    await pair.consumer.pull(pair.publish(range(5)), range(5))
    assert pair.copied(range(5), range(5))


async def test_late_writes_are_over_before_the_pull_ends(pair):
    pair.network.faults.drop = {4}
    pair.network.faults.late = 0.2
    pull = asyncio.create_task(pair.consumer.pull(pair.publish(range(8)), range(8)))
    await asyncio.sleep(0.05)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    pair.poison()
    await asyncio.sleep(0.3)
    assert all(pair.poisoned(i) for i in range(64))


async def test_a_pull_from_a_dead_address_is_an_error(pair):
    ref = pair.publish([0])
    pair.network.detach(ref.control_address)
    with pytest.raises(KvTransferError, match="no producer"):
        await pair.consumer.pull(ref, [0])
