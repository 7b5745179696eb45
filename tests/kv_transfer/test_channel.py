"""The control plane over real gRPC: choice of transport, refusals, idempotence."""

from __future__ import annotations

import asyncio
import dataclasses
import logging

import grpc.aio
import pytest

from baton.errors import KvTransferError
from baton.internal.v1 import kv_pb2
from kv_transfer import local
from kv_transfer.channel import GrpcDialer
from kv_transfer.consumer import PullConsumer
from kv_transfer.contract import KvLayout


@pytest.fixture
def transport() -> str:
    """The producer offers both; consumers here choose."""
    return "tcp"


@pytest.fixture
async def pull_with(pair, layout):
    """Pull four blocks with a consumer of these dialer options; returns the transport used."""

    async def pull_with(**options) -> str:
        dialer = GrpcDialer(options.pop("layout_digest", layout.digest), **options)
        consumer = PullConsumer(pair.target, layout, dialer)
        try:
            report = await consumer.pull(pair.publish(range(4)), range(4))
        finally:
            await consumer.close()
            await dialer.close()
        assert pair.copied(range(4), range(4))
        return report.transport

    return pull_with


async def test_one_host_means_shared_memory_and_two_mean_tcp(pull_with):
    assert await pull_with() == "shm"
    assert await pull_with(host_id="elsewhere") == "tcp"
    assert await pull_with(transports=["tcp", "shm"]) == "tcp"


async def test_a_map_that_fails_falls_back_to_tcp_with_one_line(pull_with, monkeypatch, caplog):
    monkeypatch.setattr(local, "peer_uid", lambda peer: -1)
    with caplog.at_level(logging.WARNING):
        assert await pull_with() == "tcp"
    assert [r.getMessage() for r in caplog.records if "trying the next" in r.getMessage()] != []
    assert len(caplog.records) == 1


async def test_no_common_transport_is_a_clear_error(pull_with):
    with pytest.raises(KvTransferError, match="no common KV transport: shm wanted, tcp offered"):
        await pull_with(transports=["shm"], host_id="elsewhere")


async def test_another_layout_is_refused_by_the_producer_too(pull_with):
    with pytest.raises(KvTransferError, match="KV layouts differ"):
        await pull_with(layout_digest="another")


def test_transports_are_known_by_name():
    for transports in (["rdma"], []):
        with pytest.raises(ValueError, match="unknown KV transports"):
            GrpcDialer("", transports=transports)


@pytest.mark.parametrize(
    "change", ["model_fingerprint", "dtype", "layers", "block_size", "scale_size"]
)
def test_every_part_of_the_layout_counts(layout: KvLayout, change):
    other = "x" if isinstance(getattr(layout, change), str) else 3
    assert dataclasses.replace(layout, **{change: other}).digest != layout.digest


async def test_another_protocol_version_is_refused(stub, layout):
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.Connect(kv_pb2.ConnectRequest(version=2, layout_digest=layout.digest))
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_calls_for_another_incarnation_are_refused(pair, stub):
    ref = pair.publish(range(4))
    calls = [
        stub.Renew(kv_pb2.RenewRequest(engine_id="old", lease_ids=[ref.lease_id])),
        stub.Release(kv_pb2.ReleaseRequest(engine_id="old", lease_id=ref.lease_id)),
        stub.Follow(kv_pb2.FollowRequest(engine_id="old", lease_id=ref.lease_id)).read(),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call
        assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert pair.producer.live_leases == 1


async def test_follow_twice_and_release_twice_answer_the_same(pair, stub):
    ref = pair.publish(range(4))
    asked = {"engine_id": ref.engine_id, "lease_id": ref.lease_id}
    streams = [[m async for m in stub.Follow(kv_pb2.FollowRequest(**asked))] for _ in range(2)]
    assert streams[0] == streams[1]
    assert [block for message in streams[0] for block in message.blocks] == [0, 1, 2, 3]
    assert [message.sealed for message in streams[0]][-1]
    release = kv_pb2.ReleaseRequest(**asked, committed=True)
    assert [(await stub.Release(release)).valid for _ in range(3)] == [True] * 3
    give_up = kv_pb2.ReleaseRequest(**asked, committed=False)
    assert not (await stub.Release(give_up)).valid
    assert (await stub.Release(release)).valid
    assert pair.freed == [ref.lease_id]


@pytest.mark.parametrize("lease_id", [b"", bytes(16), b"x" * 1000])
async def test_an_unknown_lease_is_gone(pair, stub, lease_id):
    asked = {"engine_id": pair.producer.engine_id, "lease_id": lease_id}
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.Follow(kv_pb2.FollowRequest(**asked)).read()
    assert failure.value.code() is grpc.StatusCode.NOT_FOUND
    renewal = kv_pb2.RenewRequest(engine_id=pair.producer.engine_id, lease_ids=[lease_id])
    (left,) = (await stub.Renew(renewal)).time_to_live
    assert left.ToTimedelta().total_seconds() == 0
    assert not (await stub.Release(kv_pb2.ReleaseRequest(**asked, committed=True))).valid


async def test_too_many_renewals_at_once_are_refused(pair, stub):
    request = kv_pb2.RenewRequest(engine_id=pair.producer.engine_id, lease_ids=[b""] * 5000)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.Renew(request)
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_follower_that_goes_away_leaves_the_lease_to_others(pair, stub, until):
    ref = pair.publish(range(4), sealed=False)
    call = stub.Follow(kv_pb2.FollowRequest(engine_id=ref.engine_id, lease_id=ref.lease_id))
    pair.producer.advance(ref.lease_id, 1)
    await call.read()
    call.cancel()
    await asyncio.sleep(0.05)
    pair.producer.seal(ref.lease_id)
    await pair.consumer.pull(ref, range(4))
    assert pair.copied(range(4), range(4))
