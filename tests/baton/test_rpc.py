"""Errors become statuses with details, in one place; servers have health and reflection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from baton import errors, rpc
from baton.v1 import model_pb2, model_pb2_grpc

SERVICE = "baton.v1.ModelService"
CASES: list[tuple[errors.BatonError, int]] = [
    (errors.InvalidRequest.of("sampling.top_p", "is 3"), code_pb2.INVALID_ARGUMENT),
    (errors.NotFound("model", "gpt"), code_pb2.NOT_FOUND),
    (errors.AlreadyExists("in use"), code_pb2.ALREADY_EXISTS),
    (errors.Overloaded("full", subject="queue", retry_after=2.5), code_pb2.RESOURCE_EXHAUSTED),
    (errors.QueueError("gone"), code_pb2.UNAVAILABLE),
    (errors.Unsupported("no"), code_pb2.UNIMPLEMENTED),
    (errors.DeadlineExceeded("late"), code_pb2.DEADLINE_EXCEEDED),
    (errors.Aborted("stop"), code_pb2.CANCELLED),
]


class Failing(model_pb2_grpc.ModelServiceServicer):
    """Raises what the test asks for."""

    error: Exception = errors.BatonError("unset")

    def __init__(self) -> None:
        self.began, self.ended = asyncio.Event(), asyncio.Event()

    async def ListModels(self, request: Any, context: Any) -> Any:
        raise self.error

    async def Tokenize(self, request: Any, context: Any) -> Any:
        return model_pb2.TokenizeResponse(token_ids=[len(request.text)])

    async def Detokenize(self, request: Any, context: Any) -> Any:
        """Fails in the moment that the client goes away."""
        self.began.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.ended.set()
            raise errors.NotFound("lease", "revoked while it was followed") from None


@pytest.fixture
async def failing() -> AsyncIterator[tuple[Failing, grpc.aio.Channel]]:
    server, servicer = rpc.Server("127.0.0.1:0"), Failing()
    model_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server.grpc)
    await server.start([SERVICE])
    async with rpc.channel(server.address) as channel:
        yield servicer, channel
    await server.stop(0)


async def status_of(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return rpc_status.from_call(caught.value) or caught.value


def unpack(status: Any, kind: type[Message]) -> Any:
    for detail in status.details:
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    raise AssertionError(f"no {kind.__name__} in {status}")


@pytest.mark.parametrize(("error", "code"), CASES, ids=lambda c: type(c).__name__)
async def test_every_error_has_its_status_and_message(
    failing: Any, error: errors.BatonError, code: int
) -> None:
    servicer, channel = failing
    servicer.error = error
    stub = model_pb2_grpc.ModelServiceStub(channel)
    status = await status_of(stub.ListModels(model_pb2.ListModelsRequest()))
    assert status.code == code
    assert status.message == str(error)


async def test_details_name_fields_resources_and_delays(failing: Any) -> None:
    servicer, channel = failing
    stub = model_pb2_grpc.ModelServiceStub(channel)

    async def raised(error: Exception) -> Any:
        servicer.error = error
        return await status_of(stub.ListModels(model_pb2.ListModelsRequest()))

    bad = unpack(await raised(CASES[0][0]), error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [("sampling.top_p", "is 3")]
    resource = unpack(await raised(CASES[1][0]), error_details_pb2.ResourceInfo)
    assert (resource.resource_type, resource.resource_name) == ("model", "gpt")
    retry = unpack(await raised(CASES[3][0]), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToTimedelta().total_seconds() == 2.5


async def test_an_unexpected_error_does_not_leak_its_text(
    failing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    servicer, channel = failing
    servicer.error = ValueError("secret path")
    stub = model_pb2_grpc.ModelServiceStub(channel)
    status = await status_of(stub.ListModels(model_pb2.ListModelsRequest()))
    assert (status.code, status.message) == (code_pb2.INTERNAL, "internal error")
    assert "secret path" in caplog.text


@pytest.mark.parametrize("payload", [b"\xff\xff\xff", b"\x12\x02\xc3\x28"], ids=["wire", "utf-8"])
async def test_a_malformed_message_is_an_invalid_argument_and_the_server_goes_on(
    failing: Any, payload: bytes
) -> None:
    _, channel = failing
    raw = channel.unary_unary(f"/{SERVICE}/Tokenize", request_serializer=lambda b: b)
    status = await status_of(raw(payload))
    assert status.code == code_pb2.INVALID_ARGUMENT
    stub = model_pb2_grpc.ModelServiceStub(channel)
    assert (await stub.Tokenize(model_pb2.TokenizeRequest(text="abc"))).token_ids == [3]


async def test_an_error_after_the_client_has_gone_is_nobodys_business(
    failing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    servicer, channel = failing
    call = model_pb2_grpc.ModelServiceStub(channel).Detokenize(model_pb2.DetokenizeRequest())
    waiting = asyncio.ensure_future(call)
    await servicer.began.wait()
    call.cancel()
    await servicer.ended.wait()
    await asyncio.gather(waiting, return_exceptions=True)
    await asyncio.sleep(0.05)
    assert caplog.records == []


async def test_unknown_fields_are_ignored(failing: Any) -> None:
    _, channel = failing
    known = model_pb2.TokenizeRequest(text="abcd").SerializeToString()
    raw = channel.unary_unary(
        f"/{SERVICE}/Tokenize",
        request_serializer=lambda b: b,
        response_deserializer=model_pb2.TokenizeResponse.FromString,
    )
    assert (await raw(known + b"\xfa\x7f\x03xyz")).token_ids == [4]


async def test_health_is_serving_only_when_told_and_can_be_watched(failing: Any) -> None:
    server = rpc.Server("127.0.0.1:0")
    await server.start([SERVICE])
    async with rpc.channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        seen = aiter(watch)
        assert (await anext(seen)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.serving()
        assert (await anext(seen)).status == health_pb2.HealthCheckResponse.SERVING
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == 1
        await server.not_serving()
        assert (await anext(seen)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
    await server.stop(0)


async def test_reflection_lists_the_services(failing: Any) -> None:
    _, channel = failing
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)

    async def ask() -> AsyncIterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")

    async for reply in stub.ServerReflectionInfo(ask()):
        names = {s.name for s in reply.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names
        break


async def test_a_taken_port_is_a_configuration_error() -> None:
    server = rpc.Server("127.0.0.1:0")
    with pytest.raises(errors.ConfigError, match="cannot listen"):
        rpc.Server(server.address)
    await server.stop(0)
