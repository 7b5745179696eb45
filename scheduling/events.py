"""What a scheduler tells its worker after a pass, besides baton.types.Output."""

from __future__ import annotations

from dataclasses import dataclass

from baton.types import Logprob, Output
from scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Logprobs of prompt tokens 1 and on (the first has none); once per request that asks."""

    request_id: str
    logprobs: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class LocalPrefill:
    """A prompt was computed here; durations in seconds, as in the proto of this name. The KV of
    `cached` tokens of it was known before."""

    request_id: str
    queued: float
    computed: float
    cached: int = 0


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The pass broke. All sequences of the request are gone."""

    request_id: str


DecodeEvent = Output | PromptLogprobs | LocalPrefill | RequestFailed


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    """The sequence has its blocks (`sequence.blocks`, for all its tokens), none of them final.

    From now on they belong to the receiver, who gives them back with `release` when nobody reads
    them any more, however the prefill ends. The scheduler goes on writing to them until
    `Prefilled`, `RequestFailed` or `abort`.
    """

    sequence: Sequence


@dataclass(frozen=True, slots=True)
class PrefillAdvanced:
    """The KV of the first `computed` tokens is final."""

    sequence: Sequence
    computed: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The KV of all tokens is final; `output` is the token sampled after them.

    `sequence` has left the scheduler and ends with that token. Durations in seconds: arrival to
    first pass, first pass to last. `prompt_logprobs` is empty unless asked for. The KV of `cached`
    tokens of the prompt was known before.
    """

    sequence: Sequence
    output: Output
    prompt_logprobs: tuple[Logprob, ...]
    queued: float
    computed: float
    cached: int = 0


PrefillEvent = PrefillStarted | PrefillAdvanced | Prefilled | RequestFailed
