"""`baton generate`: one request from the terminal, as any client would send it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import grpc
import grpc.aio
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from baton.v1 import generation_pb2 as api
from baton.v1 import generation_pb2_grpc, model_pb2, model_pb2_grpc


@dataclass(frozen=True, slots=True)
class Ask:
    """What the command line asks for; None leaves it to the server.

    `chat` None sends a chat turn to models that have a chat template, plain text to others.
    """

    text: str
    address: str
    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    system: str = ""
    chat: bool | None = None
    as_json: bool = False
    timeout: float = 300.0


async def run(ask: Ask) -> int:
    """Print the answer as it comes; returns the exit code."""
    async with grpc.aio.insecure_channel(ask.address) as channel:
        try:
            await _stream(ask, channel)
        except grpc.aio.AioRpcError as error:
            print(f"baton: {describe(error)}", file=sys.stderr)
            return 1
    return 0


async def _stream(ask: Ask, channel: grpc.aio.Channel) -> None:
    chat = await _is_chat(ask, channel) if ask.chat is None else ask.chat
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    async for response in stub.Generate(request_of(ask, chat=chat), timeout=ask.timeout):
        if ask.as_json:
            print(json.dumps(MessageToDict(response, preserving_proto_field_name=True)), flush=True)
        elif response.HasField("delta"):
            print(response.delta.text, end="", flush=True)
    if not ask.as_json:
        print()


async def _is_chat(ask: Ask, channel: grpc.aio.Channel) -> bool:
    """Whether the model can render a chat: whether it has a chat template."""
    stub = model_pb2_grpc.ModelServiceStub(channel)
    request = model_pb2.TokenizeRequest(model=ask.model, chat=request_of(ask, chat=True).chat)
    try:
        await stub.Tokenize(request, timeout=ask.timeout)
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
            return False
        raise
    return True


def request_of(ask: Ask, *, chat: bool) -> api.GenerateRequest:
    """The request for `ask`, as a chat turn or as plain text."""
    request = api.GenerateRequest(
        model=ask.model,
        sampling=api.SamplingParams(temperature=ask.temperature, seed=ask.seed),
        stopping=api.StoppingParams(max_tokens=ask.max_tokens),
        response=api.ResponseOptions(timing=True),
    )
    if not chat:
        request.prompt = ask.text
        return request
    turns = [api.ChatMessage(role="user", content=ask.text)]
    if ask.system:
        turns.insert(0, api.ChatMessage(role="system", content=ask.system))
    request.chat.CopyFrom(api.ChatInput(messages=turns))
    return request


def describe(error: grpc.aio.AioRpcError) -> str:
    """One line: the status, its message, and what its details add."""
    facts = []
    status = rpc_status.from_call(error)  # type: ignore[arg-type] # duck-typed
    for packed in status.details if status else ():
        if packed.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            packed.Unpack(retry)
            facts.append(f"retry in {retry.retry_delay.ToTimedelta().total_seconds():g} s")
    extra = f" ({', '.join(facts)})" if facts else ""
    text = " ".join((error.details() or "no details").split())
    return f"{error.code().name}: {text}{extra}"
