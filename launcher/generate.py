"""`baton generate`: one request from the terminal, as any client would send it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import grpc.aio
from google.protobuf.json_format import MessageToDict
from google.rpc import code_pb2

from baton import rpc
from baton.client import Client, Prompt, error_of, request
from baton.errors import BatonError, InvalidRequest, Overloaded, Unavailable
from baton.v1 import generation_pb2, model_pb2


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

    def message(self, *, chat: bool) -> generation_pb2.GenerateRequest:
        """The request, as a chat turn or as plain text."""
        prompt: Prompt = self.text
        if chat:
            system = [{"role": "system", "content": self.system}] if self.system else []
            prompt = [*system, {"role": "user", "content": self.text}]
        return request(
            prompt,
            model=self.model,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            timing=True,
        )


async def run(ask: Ask) -> int:
    """Print the answer as it comes; returns the exit code."""
    async with Client(ask.address) as client:
        try:
            await _stream(ask, client)
        except grpc.aio.AioRpcError as error:
            print(f"baton: {describe(error_of(error))}", file=sys.stderr)
            return 1
    return 0


async def _stream(ask: Ask, client: Client) -> None:
    chat = await _is_chat(ask, client) if ask.chat is None else ask.chat
    async for response in client.generation.Generate(ask.message(chat=chat), timeout=ask.timeout):
        if ask.as_json:
            print(json.dumps(MessageToDict(response, preserving_proto_field_name=True)), flush=True)
        elif response.HasField("delta"):
            print(response.delta.text, end="", flush=True)
    if not ask.as_json:
        print()


async def _is_chat(ask: Ask, client: Client) -> bool:
    """Whether the model can render a chat: whether it has a chat template."""
    turns = ask.message(chat=True).chat
    try:
        await client.models.Tokenize(
            model_pb2.TokenizeRequest(model=ask.model, chat=turns), timeout=ask.timeout
        )
    except grpc.aio.AioRpcError as error:
        if isinstance(error_of(error), InvalidRequest):
            return False
        raise
    return True


def describe(error: BatonError) -> str:
    """One line: the gRPC status, its message, and when to try again."""
    text = " ".join(str(error).split())
    if type(error) is BatonError:  # a status with no error of its own: the text names it
        return text
    retry = error.retry_after if isinstance(error, Overloaded | Unavailable) else 0
    suffix = f" (retry in {retry:g} s)" if retry else ""
    return f"{code_pb2.Code.Name(rpc.status_of(error).code)}: {text}{suffix}"
