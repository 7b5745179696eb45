"""The ModelService RPCs: what is served, and its tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import grpc.aio

from baton.errors import InvalidRequest
from baton.v1 import model_pb2_grpc
from baton.v1.model_pb2 import (
    DetokenizeRequest,
    DetokenizeResponse,
    ListModelsRequest,
    ListModelsResponse,
    Model,
    TokenizeRequest,
    TokenizeResponse,
)
from gateway.core import Gateway
from gateway.prompt import PromptEncoder
from gateway.validation import Validator

Context = grpc.aio.ServicerContext[Any, Any]

CAPABILITIES = (
    "abort",
    "logprobs",
    "logit_bias",
    "allowed_token_ids",
    "multiple_sequences",
    "prompt_logprobs",
    "stop_strings",
    "time_limit",
)
_INLINE_TOKENS = 4096


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """One model is served."""

    def __init__(self, gateway: Gateway, validator: Validator, prompts: PromptEncoder) -> None:
        self._gateway = gateway
        self._validator = validator
        self._prompts = prompts

    async def ListModels(self, request: ListModelsRequest, context: Context) -> ListModelsResponse:
        """The model, with limits and capabilities."""
        facts = self._gateway.facts
        workers = self._gateway.fleet.records
        digests = {worker.model for worker in workers}
        chat = ("chat",) if self._gateway.tokenizer.template is not None else ()
        model = Model(
            name=facts.name,
            revision=min(digests, default=""),
            max_context_tokens=self._gateway.max_context(),
            vocab_size=facts.vocab_size,
            capabilities=sorted(CAPABILITIES + chat),
            weight_dtype=_listed(worker.weight_dtype for worker in workers),
            kv_dtype=_listed(worker.kv_dtype for worker in workers),
        )
        return ListModelsResponse(models=[model])

    async def Tokenize(self, request: TokenizeRequest, context: Context) -> TokenizeResponse:
        """Ids of a text or chat, as Generate would see them."""
        self._validator.check_model(request.model)
        match request.WhichOneof("input"):
            case "text":
                ids = await self._prompts.text(request.text, field="text")
            case "chat":
                ids = await self._prompts.chat(request.chat)
            case _:
                raise InvalidRequest.of("input", "one of text and chat must be set")
        return TokenizeResponse(token_ids=ids)

    async def Detokenize(self, request: DetokenizeRequest, context: Context) -> DetokenizeResponse:
        """Text of ids, special tokens included."""
        self._validator.check_model(request.model)
        vocab = self._gateway.facts.vocab_size
        for i, token in enumerate(request.token_ids):
            if token >= vocab:
                raise InvalidRequest.of(
                    f"token_ids[{i}]", f"token id {token} is not in the vocabulary of {vocab}"
                )
        ids, decode = list(request.token_ids), self._gateway.tokenizer.decode
        if len(ids) <= _INLINE_TOKENS:
            return DetokenizeResponse(text=decode(ids, skip_special_tokens=False))
        text = await asyncio.to_thread(decode, ids, skip_special_tokens=False)
        return DetokenizeResponse(text=text)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))
