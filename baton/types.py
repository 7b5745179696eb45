"""What a request is, once its text has become token ids.

Frozen and shared by every process. Nothing here knows protobuf (see wire.py), tokenization
(the gateway's business) or how anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    """Why a sequence ended. Values are the numbers of baton.v1.FinishReason."""

    STOP = 1
    LENGTH = 2
    TIME_LIMIT = 3
    ABORTED = 4


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen from the logits, in this order: penalties, bias, allowed tokens,
    min tokens, temperature, top-k, top-p, min-p.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off; penalties are off at 0
    (presence, frequency) and 1 (repetition). The random numbers of a token depend on
    (seed, sequence index, position) only.
    """

    n: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Stopping:
    """When a sequence ends. Stop strings are the gateway's: the engine sees tokens only."""

    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    eos_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class PriorOutput:
    """Output tokens of an earlier attempt, which the client already has."""

    token_ids: tuple[int, ...] = ()
    finished: bool = False


@dataclass(frozen=True, slots=True)
class LengthEstimate:
    """How long each output of a request is expected to be (S3).

    `tokens` is the expected output length, by which work is ordered. `allotment` is the output
    that KV is reserved for: the upper end of the predicted bucket. Neither limits the output.
    """

    tokens: int
    allotment: int


@dataclass(frozen=True, slots=True)
class Request:
    """A tokenized request with every default resolved.

    `logprobs` and `prompt_logprobs` count alternatives; None means none are reported at all.
    `arrived_at` and `deadline` are seconds on the clock of the process that holds the request;
    `waited` is how old it was when it came there, as clocks of two hosts never meet. `tenant` is
    an opaque key: who has the same shares a worker's batch with those of the same. KV of a prefix
    is reused among requests of one tenant with the same `cache_salt`, unless `bypass_cache`.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stopping: Stopping
    priority: int = 0
    level: int = 0
    arrived_at: float = 0.0
    waited: float = 0.0
    deadline: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prior_outputs: tuple[PriorOutput, ...] = ()
    estimate: LengthEstimate | None = None  # None: nothing was predicted
    tenant: str = ""
    cache_salt: str = ""
    bypass_cache: bool = False  # neither finds KV of others nor leaves any to them

    def prior(self, index: int) -> PriorOutput:
        """What earlier attempts generated for sequence `index`."""
        return self.prior_outputs[index] if self.prior_outputs else PriorOutput()


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log probability of a token under the model, before any penalty or temperature.

    `rank` is one-based; `top` holds (token id, logprob), most likely first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """How a sequence ended; `token_id` is the stop or end-of-sequence token that matched."""

    reason: FinishReason
    token_id: int | None = None
    is_eos: bool = False


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens of one sequence after one engine step; `finish` is set on the last one."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = field(default=())
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """Who may work on a request now. Work and reports under an older fence are dropped."""

    fence: int
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class KvRef:
    """A short-lived reference to KV blocks held by a prefill worker.

    `time_to_live` is relative, in seconds: clocks of two hosts never meet.
    """

    lease_id: bytes
    control_address: str
    engine_id: str
    layout_digest: str
    blocks: int
    tokens: int
    time_to_live: float


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a worker is. `swapped` counts those of `waiting` whose KV is on the host, or on its
    way there, in `host_blocks` blocks.

    In reports only: `steps_per_second`, over the last few seconds, and the fitted cost of a pass
    with one prompt, `prefill_base + prefill_per_token * tokens`, and of one generated token,
    `token_seconds`; all in seconds, 0 until measured.
    """

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    draining: bool = False
    steps_per_second: float = 0.0
    prefill_base: float = 0.0
    prefill_per_token: float = 0.0
    token_seconds: float = 0.0
    swapped: int = 0
    host_blocks: int = 0
