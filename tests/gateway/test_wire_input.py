"""What no well-behaved client sends: the status is clear and the server goes on serving."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from baton.v1.generation_pb2 import GenerateRequest, GenerateResponse

GENERATE = "/baton.v1.GenerationService/Generate"


async def status_of(address: str, payload: bytes) -> grpc.aio.AioRpcError | None:
    """Send raw bytes as a GenerateRequest; the error, or None when it was served."""
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = channel.unary_stream(GENERATE, response_deserializer=GenerateResponse.FromString)
        try:
            async for _ in call(payload):
                pass
        except grpc.aio.AioRpcError as error:
            return error
        return None


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"\x1a\x03\xff\xfe\xfd", grpc.StatusCode.INVALID_ARGUMENT),  # prompt: not UTF-8
        (b"\x1a\x7f", grpc.StatusCode.INVALID_ARGUMENT),  # prompt: shorter than it says
        (b"\xff" * 20, grpc.StatusCode.INVALID_ARGUMENT),
        (b"", grpc.StatusCode.INVALID_ARGUMENT),
        (
            GenerateRequest(prompt="x" * 4_500_000).SerializeToString(),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            GenerateRequest(prompt="x" * 10_000_000).SerializeToString(),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
        ),
    ],
    ids=["utf8", "truncated", "noise", "empty", "over our bound", "10 MB"],
)
async def test_malformed_and_huge_messages_have_a_clear_status(pair, payload, code):
    error = await status_of(pair.server.address, payload)
    assert error.code() is code
    assert (await pair.client.generate_unary("hello", max_tokens=2)).text


async def test_unknown_fields_are_ignored(pair):
    message = GenerateRequest(prompt="hello")
    message.stopping.max_tokens = 2
    unknown = b"\xba\x3e\x03abc"  # field 999, a string
    assert await status_of(pair.server.address, message.SerializeToString() + unknown) is None


async def test_violations_travel_as_details(pair):
    message = GenerateRequest(prompt="hello")
    message.sampling.top_p = 9.0
    error = await status_of(pair.server.address, message.SerializeToString())
    detail = error_details_pb2.BadRequest()
    rpc_status.from_call(error).details[0].Unpack(detail)
    assert [violation.field for violation in detail.field_violations] == ["sampling.top_p"]
