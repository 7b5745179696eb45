"""The one validator of generation requests: hard bounds, every bad field named at once.

Two rules that callers should know. `max_tokens` past the end of the context is cut to what is
left, `min_tokens` with it, and the output then ends with FINISH_REASON_LENGTH. `queue_timeout`
past the server's own is cut to that.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable

from baton.config import GatewayConfig
from baton.errors import InvalidRequest, NotFound, Unsupported
from baton.types import Request, Sampling, Stopping
from baton.v1.generation_pb2 import GenerateRequest, ResponseOptions, SamplingParams
from gateway.fields import Fields
from gateway.job import Job, ResponseFormat, tenant_key
from gateway.model_files import ModelFacts
from gateway.prompt import PromptEncoder

MAX_ID_CHARS = 128
MAX_LABELS = 64
MAX_LABEL_CHARS = 256
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 256
MAX_LOGIT_BIAS = 1024
MAX_PRIORITY = 1000
MAX_RESUME_SECONDS = 3600.0
MAX_STREAM_INTERVAL = 65_536
_UINT32 = 2**32 - 1
_ID = re.compile(r"[A-Za-z0-9._:/@+=-]+")


class Validator:
    """Turns a GenerateRequest into a Job."""

    def __init__(
        self,
        facts: ModelFacts,
        prompts: PromptEncoder,
        config: GatewayConfig,
        max_context: Callable[[], int],
    ) -> None:
        """`max_context` is asked at each request: it depends on the live workers."""
        self._facts = facts
        self._prompts = prompts
        self._config = config
        self._max_context = max_context

    async def validate(self, message: GenerateRequest, now: float) -> Job:
        """Raises NotFound, Unsupported or InvalidRequest."""
        self.check_model(message.model)
        if message.adapter:
            raise NotFound("adapter", message.adapter[:MAX_ID_CHARS])
        if message.HasField("structured_output"):
            raise Unsupported("structured_output is not supported by this server yet")
        fields = Fields()
        request_id = _request_id(fields, message.request_id)
        _labels(fields, message)
        sampling = self._sampling(fields, message.sampling)
        response = _response(fields, message.response)
        prompt = await self._prompt(fields, message)
        stopping = self._stopping(fields, message, len(prompt))
        tenant = message.user or "default"
        request = Request(
            id=request_id,
            prompt_ids=prompt,
            sampling=sampling,
            stopping=stopping,
            priority=message.priority,
            tenant=tenant_key(tenant),
            cache_salt=message.cache.salt,
            bypass_cache=message.cache.bypass_prefix_cache,
            arrived_at=now,
            logprobs=self._logprobs(fields, message.response, "response.logprobs"),
            prompt_logprobs=self._logprobs(fields, message.response, "response.prompt_logprobs"),
        )
        longest = self._config.request_timeout
        queue_timeout = fields.duration(message, "queue_timeout", math.inf)
        fields.duration(message, "resume_window", MAX_RESUME_SECONDS, zero_allowed=True)
        job = Job(
            request=request,
            tenant=tenant,
            queue_timeout=min(queue_timeout or math.inf, self._config.queue_timeout),
            time_limit=fields.duration(message.stopping, "stopping.time_limit", longest),
            stop_strings=self._stop_strings(fields, list(message.stopping.stop)),
            include_stop=message.stopping.include_stop,
            labels=dict(message.labels),
            response=response,
        )
        fields.raise_if_any()
        return job

    def check_model(self, name: str) -> None:
        """Raises NotFound unless `name` is empty or the served model's."""
        if name not in ("", self._facts.name):
            raise NotFound("model", name[:MAX_ID_CHARS])

    async def _prompt(self, fields: Fields, message: GenerateRequest) -> tuple[int, ...]:
        """Token ids of whichever input is set; empty after a violation."""
        longest = self._max_context() - 1  # one position is for the first output token
        keep = fields.optional_integer(message, "truncate_prompt_tokens", 1, _UINT32)
        try:
            match message.WhichOneof("input"):
                case "prompt":
                    ids = tuple(await self._prompts.text(message.prompt))
                case "chat":
                    ids = tuple(await self._prompts.chat(message.chat))
                case "token_ids":
                    ids = self._given_ids(fields, message, keep, longest)
                case _:
                    fields.add("input", "one of prompt, token_ids and chat must be set")
                    return ()
        except InvalidRequest as error:
            fields.include(error)
            return ()
        ids = ids if keep is None else ids[-keep:]
        if len(ids) > longest:
            name = message.WhichOneof("input") or "input"
            fields.add(name, f"has {len(ids)} tokens, the longest prompt has {longest}")
            return ()
        return ids

    def _given_ids(
        self, fields: Fields, message: GenerateRequest, keep: int | None, longest: int
    ) -> tuple[int, ...]:
        ids = message.token_ids.ids
        if not ids:
            fields.add("token_ids.ids", "must not be empty")
            return ()
        kept = ids if keep is None else ids[-keep:]
        # What is too long anyway is not looked at: it may be millions.
        return fields.token_ids(kept, "token_ids.ids", self._facts.vocab_size, longest)

    def _sampling(self, fields: Fields, params: SamplingParams) -> Sampling:
        defaults = self._facts.defaults
        vocab = self._facts.vocab_size

        def number(
            name: str, default: float, low: float, high: float, above: bool = False
        ) -> float:
            return fields.number(params, f"sampling.{name}", default, low, high, above_low=above)

        return Sampling(
            n=fields.integer(params, "sampling.n", 1, 1, self._config.max_sequences_per_request),
            temperature=number("temperature", defaults.temperature, 0, 100),
            top_p=number("top_p", defaults.top_p, 0, 1, above=True),
            top_k=min(fields.integer(params, "sampling.top_k", defaults.top_k, 0, _UINT32), vocab),
            min_p=number("min_p", defaults.min_p, 0, 1),
            presence_penalty=number("presence_penalty", 0, -2, 2),
            frequency_penalty=number("frequency_penalty", 0, -2, 2),
            repetition_penalty=number(
                "repetition_penalty", defaults.repetition_penalty, 0, 100, above=True
            ),
            seed=params.seed if params.HasField("seed") else secrets.randbits(64),
            logit_bias=self._logit_bias(fields, params),
            allowed_token_ids=tuple(
                dict.fromkeys(
                    fields.token_ids(
                        params.allowed_token_ids, "sampling.allowed_token_ids", vocab, vocab
                    )
                )
            ),
        )

    def _logit_bias(self, fields: Fields, params: SamplingParams) -> tuple[tuple[int, float], ...]:
        path = "sampling.logit_bias"
        ids = fields.token_ids(params.logit_bias, path, self._facts.vocab_size, MAX_LOGIT_BIAS)
        for token in ids:
            if not abs(params.logit_bias[token]) <= 100:  # NaN too
                fields.add(f"{path}[{token}]", "must be a number from -100 to 100")
                return ()
        return tuple((token, params.logit_bias[token]) for token in sorted(ids))

    def _stopping(self, fields: Fields, message: GenerateRequest, prompt_tokens: int) -> Stopping:
        params = message.stopping
        default = self._config.default_max_tokens
        wanted = fields.integer(params, "stopping.max_tokens", default, 1, _UINT32)
        least = fields.integer(params, "stopping.min_tokens", 0, 0, _UINT32)
        if not params.HasField("max_tokens"):
            wanted = max(wanted, least)
        elif least > wanted:
            fields.add("stopping.min_tokens", f"must be at most max_tokens ({wanted})")
        room = max(1, self._max_context() - prompt_tokens)
        most = min(wanted, room)
        return Stopping(
            max_tokens=most,
            min_tokens=min(least, most),
            stop_token_ids=frozenset(
                fields.token_ids(
                    params.stop_token_ids,
                    "stopping.stop_token_ids",
                    self._facts.vocab_size,
                    MAX_STOP_TOKENS,
                )
            ),
            eos_token_ids=frozenset() if params.ignore_eos else self._facts.eos_token_ids,
        )

    def _stop_strings(self, fields: Fields, stops: list[str]) -> tuple[str, ...]:
        most = self._config.max_stop_strings
        if len(stops) > most:
            fields.add("stopping.stop", f"has {len(stops)} entries, at most {most} are allowed")
            return ()
        for i, stop in enumerate(stops):
            if not 1 <= len(stop) <= MAX_STOP_CHARS:
                fields.add(f"stopping.stop[{i}]", f"must have 1 to {MAX_STOP_CHARS} characters")
        return tuple(dict.fromkeys(stops))

    def _logprobs(self, fields: Fields, options: ResponseOptions, path: str) -> int | None:
        return fields.optional_integer(options, path, 0, self._config.max_logprobs)


def _request_id(fields: Fields, given: str) -> str:
    if not given:
        return secrets.token_hex(16)
    if len(given) > MAX_ID_CHARS or not _ID.fullmatch(given):
        fields.add(
            "request_id",
            f"must be at most {MAX_ID_CHARS} characters out of A-Z a-z 0-9 . _ : / @ + = -",
        )
    return given


def _labels(fields: Fields, message: GenerateRequest) -> None:
    """Fields that are bounded and never affect results."""
    fields.label(message.user, "user", MAX_ID_CHARS)
    fields.label(message.session_id, "session_id", MAX_ID_CHARS)
    fields.label(message.cache.salt, "cache.salt", MAX_LABEL_CHARS)
    if abs(message.priority) > MAX_PRIORITY:
        fields.add("priority", f"must be from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    if len(message.labels) > MAX_LABELS:
        fields.add("labels", f"has {len(message.labels)} entries, at most {MAX_LABELS} are allowed")
    elif any(max(len(k), len(v)) > MAX_LABEL_CHARS for k, v in message.labels.items()):
        fields.add("labels", f"keys and values must be at most {MAX_LABEL_CHARS} characters")


def _response(fields: Fields, options: ResponseOptions) -> ResponseFormat:
    interval = fields.integer(options, "response.stream_interval", 1, 1, MAX_STREAM_INTERVAL)
    return ResponseFormat(
        text=options.text or not options.HasField("text"),
        token_ids=options.token_ids,
        timing=options.timing,
        skip_special_tokens=(
            options.skip_special_tokens or not options.HasField("skip_special_tokens")
        ),
        stream_interval=interval,
    )
