"""The GenerationService RPCs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from baton import rpc
from baton.errors import Unsupported
from baton.v1 import generation_pb2_grpc
from baton.v1.generation_pb2 import (
    AbortRequest,
    AbortResponse,
    Delta,
    GenerateRequest,
    GenerateResponse,
    GenerateUnaryRequest,
    GenerateUnaryResponse,
    ResumeRequest,
    ResumeResponse,
)
from gateway.core import Gateway
from gateway.job import Job
from gateway.session import Session
from gateway.validation import MAX_STREAM_INTERVAL, Validator

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Validates, opens a session, drains it. Cancelling the RPC ends the session."""

    def __init__(self, gateway: Gateway, validator: Validator) -> None:
        self._gateway = gateway
        self._validator = validator

    async def Generate(
        self, request: GenerateRequest, context: Context
    ) -> AsyncIterator[GenerateResponse]:
        """Stream one request's output."""
        with self._counted():
            session = await self._gateway.sessions.open(await self._job(request, context))
            try:
                async for response in session.responses():
                    yield response
            finally:
                self._gateway.sessions.cancel(session)

    async def GenerateUnary(
        self, request: GenerateUnaryRequest, context: Context
    ) -> GenerateUnaryResponse:
        """Return one request's output in one piece."""
        with self._counted():
            job = await self._job(request.request, context)
            whole = replace(job.response, stream_interval=MAX_STREAM_INTERVAL)
            session = await self._gateway.sessions.open(replace(job, response=whole))
            try:
                return await _assemble(session)
            finally:
                self._gateway.sessions.cancel(session)

    async def Resume(
        self, request: ResumeRequest, context: Context
    ) -> AsyncIterator[ResumeResponse]:
        """Not yet."""
        raise Unsupported(
            "Resume is not supported by this server yet: send the request again, with the text "
            "received so far appended to the prompt"
        )
        yield  # makes this a generator, as a streaming handler must be

    async def Abort(self, request: AbortRequest, context: Context) -> AbortResponse:
        """End live requests with what they have."""
        aborted = self._gateway.sessions.abort(request.request_ids)
        if aborted:
            log.info("aborted %d requests: %s", len(aborted), request.reason[:200])
        return AbortResponse(aborted_request_ids=aborted)

    async def _job(self, request: GenerateRequest, context: Context) -> Job:
        now = time.monotonic()
        left = context.time_remaining()
        cap = self._gateway.config.request_timeout
        request.request_id = request.request_id or _header(context, "x-request-id")
        job = await self._validator.validate(request, now)
        if self._gateway.lengths is not None:
            job = await self._gateway.lengths.predicted(job)
        deadline = now + (cap if left is None else min(left, cap))
        self._gateway.metrics.prompt_tokens.inc(len(job.request.prompt_ids))
        return replace(job, request=replace(job.request, deadline=deadline))

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count an RPC while it runs and by its status."""
        metrics, code = self._gateway.metrics, "CANCELLED"
        metrics.inflight.inc()
        try:
            yield
            code = "OK"
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:
            code = _NAMES[rpc.status_of(error).code]
            raise
        finally:
            metrics.inflight.dec()
            metrics.requests.labels(code=code).inc()


def _header(context: Context, name: str) -> str:
    """A value of the call's metadata, empty when there is none."""
    values = (value for key, value in context.invocation_metadata() or () if key == name)
    return str(next(values, ""))


async def _assemble(session: Session) -> GenerateUnaryResponse:
    """One delta per sequence, holding all of it."""
    response = GenerateUnaryResponse(request_id=session.id)
    outputs = [Delta(index=output.index) for output in session.outputs]
    async for part in session.responses():
        match part.WhichOneof("event"):
            case "accepted":
                response.accepted.CopyFrom(part.accepted)
            case "delta":
                _append(outputs[part.delta.index], part.delta)
            case "finished":
                response.finished.append(part.finished)
            case "usage":
                response.usage.CopyFrom(part.usage)
                response.accepted.cached_tokens = part.usage.cached_tokens
    response.outputs.extend(outputs)
    response.finished.sort(key=lambda finished: finished.index)
    return response


def _append(whole: Delta, delta: Delta) -> None:
    whole.text += delta.text
    whole.token_count += delta.token_count
    whole.token_ids.extend(delta.token_ids)
    whole.logprobs.extend(delta.logprobs)
