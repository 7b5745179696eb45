"""gRPC servers and channels as every process makes them, and the one place where errors become
statuses."""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from baton import errors
from baton.errors import BatonError, ConfigError

log = logging.getLogger(__name__)

MAX_METADATA_BYTES = 16 * 1024
INTERNAL_MESSAGE_BYTES = 64 * 2**20  # between our own processes: prompt logprobs are large

Handler = Callable[..., Any]


def status_of(error: BaseException) -> status_pb2.Status:
    """The google.rpc.Status of an error; anything unexpected is INTERNAL without its text."""
    match error:
        case errors.InvalidRequest():
            bad = error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=v.field, description=v.description
                    )
                    for v in error.violations
                ]
            )
            return _status(code_pb2.INVALID_ARGUMENT, error, bad)
        case errors.NotFound():
            resource = error_details_pb2.ResourceInfo(
                resource_type=error.kind, resource_name=error.name
            )
            return _status(code_pb2.NOT_FOUND, error, resource)
        case errors.AlreadyExists():
            return _status(code_pb2.ALREADY_EXISTS, error)
        case errors.Overloaded():
            quota = error_details_pb2.QuotaFailure(
                violations=[
                    error_details_pb2.QuotaFailure.Violation(
                        subject=error.subject, description=str(error)
                    )
                ]
            )
            retry = _retry(error.retry_after)
            return _status(code_pb2.RESOURCE_EXHAUSTED, error, retry, quota)
        case errors.Unavailable():
            return _status(code_pb2.UNAVAILABLE, error, _retry(error.retry_after))
        case errors.Unsupported():
            return _status(code_pb2.UNIMPLEMENTED, error)
        case errors.DeadlineExceeded():
            return _status(code_pb2.DEADLINE_EXCEEDED, error)
        case errors.Aborted():
            return _status(code_pb2.CANCELLED, error)
        case _:
            return status_pb2.Status(code=code_pb2.INTERNAL, message="internal error")


def _status(code: int, error: BaseException, *details: Message) -> status_pb2.Status:
    packed = []
    for detail in details:
        wrapped = any_pb2.Any()
        wrapped.Pack(detail)
        packed.append(wrapped)
    # Metadata has an 8 KiB soft limit, and the text of an error may quote the request.
    return status_pb2.Status(code=code, message=str(error)[:1000], details=packed)


def _retry(seconds: float) -> error_details_pb2.RetryInfo:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


class _Malformed:
    """Stands for a message that did not parse, until the handler's wrapper can refuse it."""


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return deserialize(data) if deserialize else data
        except Exception:  # protobuf raises several kinds, all of which mean a malformed message
            return _Malformed()

    return parse


def _checked(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise errors.InvalidRequest.of("", "not a valid message (bad wire format or UTF-8)")
    return request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


async def _abort(context: Any, error: Exception) -> None:
    """End the RPC with the status of `error`."""
    # gRPC's own: the handler has ended the RPC, or tried to when the client had gone already.
    if isinstance(error, (grpc.aio.AbortError, grpc.aio.InternalError)):
        raise error
    if not isinstance(error, BatonError):
        log.exception("unexpected error in a handler", exc_info=error)
    await context.abort_with_status(rpc_status.to_status(status_of(error)))


_HANDLERS: dict[tuple[bool, bool], Callable[..., grpc.RpcMethodHandler[Any, Any]]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
"""By whether requests and responses are streams."""


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg] # stubs only
    """Turns BatonErrors into statuses with details, malformed messages into INVALID_ARGUMENT and
    everything else into a bare INTERNAL. CancelledError passes: swallowing it leaks the RPC."""

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap the handler of one RPC."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        streams_in, streams_out = handler.request_streaming, handler.response_streaming
        inner = cast(
            Handler,
            handler.stream_stream
            or handler.stream_unary
            or handler.unary_stream
            or handler.unary_unary,
        )

        def checked(request: Any) -> Any:
            return _checked_stream(request) if streams_in else _checked(request)

        async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                return await inner(checked(request), context)
            except Exception as error:
                return await _abort(context, error)

        async def stream(
            request: Any, context: grpc.aio.ServicerContext[Any, Any]
        ) -> AsyncIterator[Any]:
            try:
                result = inner(checked(request), context)
                if inspect.isawaitable(result):  # the health service writes to the context itself
                    await result
                    return
                async for response in result:
                    yield response
            except Exception as error:
                await _abort(context, error)

        return _HANDLERS[streams_in, streams_out](
            stream if streams_out else unary,
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


class Server:
    """A gRPC server with health and reflection. NOT_SERVING until `serving()`."""

    def __init__(self, address: str, *, max_message_bytes: int = INTERNAL_MESSAGE_BYTES) -> None:
        """Bind `address`; port 0 takes a free one (see `address`). Raises ConfigError."""
        self.grpc = grpc.aio.server(
            interceptors=[ErrorInterceptor()],
            options=[
                ("grpc.so_reuseport", 0),  # else a second server binds the same port in silence
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.http2.max_ping_strikes", 0),
            ],
        )
        self.health = health.aio.HealthServicer()  # type: ignore[attr-defined] # not in the stubs
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)
        self._services: list[str] = []
        try:
            port = self.grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(f"--address {address}: cannot listen there: {error}") from error
        host = address.rpartition(":")[0]
        self.address = address if address.startswith("unix:") else f"{host}:{port}"

    async def start(self, services: Sequence[str]) -> None:
        """Accept RPCs; `services` are the full names to reflect and report health for."""
        self._services = list(services)
        reflection.enable_server_reflection(
            [*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name], self.grpc
        )
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self.grpc.start()

    async def serving(self) -> None:
        """Report SERVING: warm, and every dependency answered once."""
        await self._set(health_pb2.HealthCheckResponse.SERVING)

    async def not_serving(self) -> None:
        """Report NOT_SERVING, to be given no new work."""
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Refuse new RPCs at once, cut what still runs after `grace` seconds."""
        await self.grpc.stop(grace)

    async def _set(self, status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
        for service in ["", *self._services]:
            await self.health.set(service, status)


def channel(address: str) -> grpc.aio.Channel:
    """A channel between our own processes."""
    return grpc.aio.insecure_channel(
        address,
        options=[
            ("grpc.max_receive_message_length", INTERNAL_MESSAGE_BYTES),
            ("grpc.max_send_message_length", INTERNAL_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.enable_retries", 0),  # retries are the caller's: it knows what is idempotent
        ],
    )
