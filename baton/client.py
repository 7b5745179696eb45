"""A small typed client of the public API.

    async with Client("127.0.0.1:50051") as client:
        async for event in client.generate("Once upon a time", max_tokens=64):
            if isinstance(event, Text):
                print(event.text, end="", flush=True)

Errors of the server arrive as the exceptions of `baton.errors`, with the fields that their
details carry; a lost connection is Unavailable.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as PackedAny
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from baton import errors, wire
from baton.v1 import generation_pb2, model_pb2
from baton.v1.generation_pb2 import GenerateRequest, GenerateResponse
from baton.v1.generation_pb2_grpc import GenerationServiceStub
from baton.v1.model_pb2_grpc import AdminServiceStub, ModelServiceStub

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages ({"role": ..., "content": ...})."""

_SAMPLING = frozenset(generation_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
_STOPPING = frozenset(generation_pb2.StoppingParams.DESCRIPTOR.fields_by_name)
_RESPONSE = frozenset(generation_pb2.ResponseOptions.DESCRIPTOR.fields_by_name) - {"text"}
_REQUEST = frozenset(GenerateRequest.DESCRIPTOR.fields_by_name)
MAX_RECEIVED_BYTES = 64 * 2**20  # prompt logprobs are large


@dataclass(frozen=True, slots=True)
class Started:
    """The request is accepted."""

    request_id: str
    prompt_tokens: int
    message: generation_pb2.Accepted


@dataclass(frozen=True, slots=True)
class Text:
    """New text of sequence `index`; `message` has token ids and logprobs, if asked for."""

    index: int
    text: str
    token_count: int
    message: generation_pb2.Delta


@dataclass(frozen=True, slots=True)
class Ended:
    """Sequence `index` ended; `reason` is "stop", "length", "time_limit" or "aborted"."""

    index: int
    reason: str
    completion_tokens: int
    message: generation_pb2.Finished


@dataclass(frozen=True, slots=True)
class Totals:
    """The last event."""

    prompt_tokens: int
    completion_tokens: int
    message: generation_pb2.Usage


Event: TypeAlias = Started | Text | Ended | Totals


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole output: `texts` and `reasons` by sequence."""

    request_id: str
    texts: tuple[str, ...]
    reasons: tuple[str, ...]
    message: generation_pb2.GenerateUnaryResponse

    @property
    def text(self) -> str:
        """The first sequence's text."""
        return self.texts[0]


class Client:
    """One channel to a gateway. Create it inside a running event loop."""

    def __init__(self, address: str) -> None:
        """`address` is host:port of a gateway without TLS."""
        self.channel = grpc.aio.insecure_channel(
            address, options=[("grpc.max_receive_message_length", MAX_RECEIVED_BYTES)]
        )
        self.generation = GenerationServiceStub(self.channel)
        self.models = ModelServiceStub(self.channel)
        self.admin = AdminServiceStub(self.channel)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close(None)

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Any
    ) -> AsyncGenerator[Event, None]:
        """Stream the answer to `prompt`. `options` are fields of SamplingParams, StoppingParams,
        ResponseOptions and GenerateRequest by name: `max_tokens=64, temperature=0.7, seed=1`.

        Leaving the iteration early cancels the request: close the iterator (`aclose`) or leave
        the task. Raises the errors of `baton.errors`, TypeError for an unknown option.
        """
        call = self.generation.Generate(request(prompt, **options), timeout=timeout)
        try:
            async for response in call:
                if (event := event_of(response)) is not None:
                    yield event
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()

    async def generate_unary(
        self, prompt: Prompt, *, timeout: float | None = None, **options: Any
    ) -> Answer:
        """The whole answer in one piece; see `generate`."""
        wrapped = generation_pb2.GenerateUnaryRequest(request=request(prompt, **options))
        try:
            response = await self.generation.GenerateUnary(wrapped, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return Answer(
            request_id=response.request_id,
            texts=tuple(output.text for output in response.outputs),
            reasons=tuple(reason_name(finished.reason) for finished in response.finished),
            message=response,
        )

    async def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        *,
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncGenerator[Event, None]:
        """Stream the answer to a chat; a plain string is one turn of the user."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        async with aclosing(self.generate(turns, timeout=timeout, **options)) as stream:
            async for event in stream:
                yield event

    async def abort(self, *request_ids: str, reason: str = "") -> list[str]:
        """End requests with what they have; returns those that were live."""
        message = generation_pb2.AbortRequest(request_ids=request_ids, reason=reason)
        try:
            response = await self.generation.Abort(message)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return list(response.aborted_request_ids)

    async def list_models(self, *, timeout: float | None = None) -> list[model_pb2.Model]:
        """What is served, with limits and capabilities."""
        message = model_pb2.ListModelsRequest()
        try:
            response = await self.models.ListModels(message, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return list(response.models)

    async def tokenize(
        self,
        text: str | Sequence[Mapping[str, str]],
        *,
        model: str = "",
        timeout: float | None = None,
    ) -> list[int]:
        """Token ids of a text or a chat, as `generate` would send them to the model."""
        message = model_pb2.TokenizeRequest(model=model)
        if isinstance(text, str):
            message.text = text
        else:
            message.chat.CopyFrom(request(text).chat)
        try:
            response = await self.models.Tokenize(message, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return list(response.token_ids)

    async def status(self, *, timeout: float | None = None) -> model_pb2.ClusterStatus:
        """A snapshot of the cluster: queue levels, workers, KV use."""
        try:
            response = await self.admin.GetStatus(model_pb2.GetStatusRequest(), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return response.status

    async def watch_status(
        self, interval: float = 1.0
    ) -> AsyncGenerator[model_pb2.ClusterStatus, None]:
        """Snapshots every `interval` seconds, the first one at once, until the iterator is closed.
        Raises the errors of `baton.errors`."""
        call = self.admin.WatchStatus(
            model_pb2.WatchStatusRequest(interval=wire.duration(interval))
        )
        try:
            async for response in call:
                yield response.status
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()


def request(prompt: Prompt, **options: Any) -> GenerateRequest:
    """The message for a prompt and options by name. Raises TypeError for an unknown option."""
    message = GenerateRequest()
    if isinstance(prompt, str):
        message.prompt = prompt
    elif prompt and isinstance(prompt[0], Mapping):
        message.chat.messages.extend(
            generation_pb2.ChatMessage(**turn)  # type: ignore[arg-type] # as the first one is
            for turn in prompt
        )
    else:
        message.token_ids.ids.extend(prompt)  # type: ignore[arg-type] # see above
    parts: dict[str, dict[str, Any]] = {"sampling": {}, "stopping": {}, "response": {}, "": {}}
    for name, value in options.items():
        if value is not None:
            parts[_part_of(name)][name] = value
    message.MergeFrom(
        GenerateRequest(
            sampling=generation_pb2.SamplingParams(**parts["sampling"]),
            stopping=generation_pb2.StoppingParams(**parts["stopping"]),
            response=generation_pb2.ResponseOptions(**parts["response"]),
            **parts[""],
        )
    )
    return message


def _part_of(option: str) -> str:
    for part, names in (
        ("sampling", _SAMPLING),
        ("stopping", _STOPPING),
        ("response", _RESPONSE),
        ("", _REQUEST),
    ):
        if option in names:
            return part
    raise TypeError(f"unknown option {option!r}")


def event_of(response: GenerateResponse) -> Event | None:
    """The event in a stream message; None for kinds that this client does not know."""
    match response.WhichOneof("event"):
        case "accepted":
            accepted = response.accepted
            return Started(response.request_id, accepted.prompt_tokens, accepted)
        case "delta":
            delta = response.delta
            return Text(delta.index, delta.text, delta.token_count, delta)
        case "finished":
            end = response.finished
            return Ended(end.index, reason_name(end.reason), end.completion_tokens, end)
        case "usage":
            usage = response.usage
            return Totals(usage.prompt_tokens, usage.completion_tokens, usage)
        case _:
            return None


def reason_name(reason: int) -> str:
    """ "stop" for FINISH_REASON_STOP; "unknown" for a value this client does not know."""
    known = generation_pb2.FinishReason.DESCRIPTOR.values_by_number.get(reason)
    return known.name.removeprefix("FINISH_REASON_").lower() if known else "unknown"


def error_of(error: grpc.aio.AioRpcError) -> errors.BatonError:
    """The exception behind a status, with what its details say."""
    text = error.details() or error.code().name
    status = rpc_status.from_call(error)  # type: ignore[arg-type] # works on any call
    details = list(status.details) if status is not None else []
    code = error.code().value[0]
    match code:
        case code_pb2.INVALID_ARGUMENT:
            bad = _detail(details, error_details_pb2.BadRequest())
            return errors.InvalidRequest(
                [errors.Violation(v.field, v.description) for v in bad.field_violations]
                or [errors.Violation("", text)]
            )
        case code_pb2.NOT_FOUND:
            resource = _detail(details, error_details_pb2.ResourceInfo())
            return errors.NotFound(resource.resource_type, resource.resource_name)
        case code_pb2.ALREADY_EXISTS:
            return errors.AlreadyExists(text)
        case code_pb2.RESOURCE_EXHAUSTED:
            quota = _detail(details, error_details_pb2.QuotaFailure())
            subject = quota.violations[0].subject if quota.violations else "message"
            return errors.Overloaded(text, subject=subject, retry_after=_retry_after(details))
        case code_pb2.UNAVAILABLE:
            return errors.Unavailable(text, retry_after=_retry_after(details))
        case code_pb2.UNIMPLEMENTED:
            return errors.Unsupported(text)
        case code_pb2.DEADLINE_EXCEEDED:
            return errors.DeadlineExceeded(text)
        case code_pb2.CANCELLED:
            return errors.Aborted(text)
        case _:
            return errors.BatonError(f"{error.code().name}: {text}")


def _retry_after(details: Sequence[PackedAny]) -> float:
    delay = _detail(details, error_details_pb2.RetryInfo()).retry_delay
    return float(delay.seconds + delay.nanos * 1e-9) or 1.0


def _detail(details: Sequence[PackedAny], into: Any) -> Any:
    """`into`, filled from the detail of its kind if there is one."""
    for packed in details:
        if packed.Is(into.DESCRIPTOR):
            packed.Unpack(into)
    return into
