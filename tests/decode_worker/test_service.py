"""The Decode stream over a real connection."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from baton import rpc, wire
from baton.internal.v1 import worker_pb2, worker_pb2_grpc
from baton.types import Claim
from decode_worker.service import DecodeService
from tests.decode_worker.conftest import CAPACITY, Pair, expected, request


@pytest.fixture
async def stub(pair: Pair) -> AsyncIterator[worker_pb2_grpc.DecodeServiceStub]:
    server = rpc.Server("127.0.0.1:0")
    worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeService(pair.decode), server.grpc)
    await server.start(["baton.internal.v1.DecodeService"])
    async with rpc.channel(server.address) as channel:
        yield worker_pb2_grpc.DecodeServiceStub(channel)
    await server.stop(0)


HELLO = worker_pb2.DecodeRequest(hello=worker_pb2.Hello(gateway_id="g"))


def start(slot: int, new: int) -> worker_pb2.DecodeRequest:
    command = worker_pb2.StartRequest(
        slot=slot,
        request=wire.request_to_proto(request("r", 9, new), now=0.0),
        claim=wire.claim_to_proto(Claim(1)),
        local_prefill=True,
    )
    return worker_pb2.DecodeRequest(start=command)


async def test_a_gateway_is_greeted_with_the_load_and_served(stub: Any) -> None:
    call = stub.Decode()
    await call.write(HELLO)
    greeting = await call.read()
    assert (greeting.load.total_kv_blocks, greeting.load.running) == (CAPACITY.blocks, 0)
    await call.write(start(5, new=6))
    tokens: list[int] = []
    while len(tokens) < 6:
        for output in (await call.read()).outputs:
            assert output.slot == 5
            tokens += output.token_ids
    assert tokens == expected(request("r", 9, 6))
    await call.done_writing()
    while await call.read() is not grpc.aio.EOF:
        pass
    assert await call.code() is grpc.StatusCode.OK


async def test_a_broken_stream_frees_what_it_held(pair: Pair, stub: Any) -> None:
    call = stub.Decode()
    await call.write(HELLO)
    await call.write(start(1, new=200))
    while not (await call.read()).outputs:
        pass
    call.cancel()
    await pair.until(lambda: pair.decode.idle)
    await pair.all_free()


async def test_a_stream_must_begin_with_hello(stub: Any) -> None:
    call = stub.Decode()
    await call.write(start(1, new=2))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read():
            pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "hello" in (caught.value.details() or "")
