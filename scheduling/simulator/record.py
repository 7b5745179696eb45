"""A run as it crossed a scheduler's boundary: every call into it, in order, as JSON lines.

The first line is a `RunHeader`, each other one a `Record`. What a scheduler cannot see is not
kept: of prompts and outputs only their lengths and, where prefixes are reused, which of them begin
alike; of a sampled token only whether it is one that the request stops at. So a run that is
replayed into a fresh scheduler (replay.py) meets the same decisions, and must give the same plans.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from baton.types import LengthEstimate, PriorOutput, Request, Sampling, Stopping
from scheduling.cost import LinearCost
from scheduling.plan import Capacity, Chunk, StepPlan, Swap
from scheduling.simulator.block_numbers import BlockNumbers, numbered

VERSION = 2
GOES_ON, STOPS = 0, 1
"""Token ids of a replay: one that means nothing, and one that every request stops at. Others are
numbers of blocks (block_numbers.py) and mean as little."""

SETTINGS = (
    "policy",
    "mlfq_levels",
    "mlfq_quantum",
    "mlfq_ratio",
    "mlfq_promote_after",
    "srpt_aging",
    "admission",
    "batching",
    "preemption",
    "swapping",
    "swap_reserve",
    "max_waiting",
    "prefix_cache",
)
"""The fields of a worker's configuration that a scheduler is built from, where it has them."""


@dataclass(frozen=True, slots=True)
class RunHeader:
    """What the scheduler was built with; `settings` maps those of SETTINGS that it has to their
    values, `cost` is the model that its CostTracker began with."""

    role: Literal["prefill", "decode"]
    capacity: Capacity
    settings: dict[str, Any]
    cost: LinearCost
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request without its tokens. `prompt` counts tokens; `prior` holds, for each sequence,
    how many tokens earlier attempts generated and whether they ended it; `estimate` is that of
    LengthEstimate. `id` is unique in a run, and orders requests that are equal otherwise.
    `blocks` and `prior_blocks` are those of BlockNumbers; none if no prefixes are reused."""

    id: str
    prompt: int
    max_tokens: int
    n: int = 1
    priority: int = 0
    level: int = 0
    arrived_at: float = 0.0
    waited: float = 0.0
    deadline: float | None = None
    prior: tuple[tuple[int, bool], ...] = ()
    estimate: tuple[int, int] | None = None
    tenant: str = ""
    prompt_logprobs: bool = False
    bypass_cache: bool = False
    blocks: tuple[int, ...] = ()
    prior_blocks: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, request: Request, numbers: BlockNumbers | None = None) -> RequestRecord:
        """What a scheduler may know of `request`. `numbers` where it reuses prefixes."""
        estimate = request.estimate
        return cls(
            id=request.id,
            prompt=len(request.prompt_ids),
            max_tokens=request.stopping.max_tokens,
            n=request.sampling.n,
            priority=request.priority,
            level=request.level,
            arrived_at=request.arrived_at,
            waited=request.waited,
            deadline=request.deadline,
            prior=tuple((len(p.token_ids), p.finished) for p in request.prior_outputs),
            estimate=None if estimate is None else (estimate.tokens, estimate.allotment),
            tenant=request.tenant,
            prompt_logprobs=request.prompt_logprobs is not None,
            bypass_cache=request.bypass_cache,
            blocks=numbers.of_prompt(request) if numbers else (),
            prior_blocks=numbers.of_priors(request) if numbers else (),
        )

    def request(self, block_size: int) -> Request:
        """A request that a scheduler treats alike, whose tokens mean nothing."""
        blocks = self.prior_blocks or ((),) * len(self.prior)
        return Request(
            id=self.id,
            prompt_ids=numbered(self.prompt, self.blocks, block_size),
            sampling=Sampling(n=self.n),
            stopping=Stopping(self.max_tokens, eos_token_ids=frozenset({STOPS})),
            priority=self.priority,
            level=self.level,
            arrived_at=self.arrived_at,
            waited=self.waited,
            deadline=self.deadline,
            prior_outputs=tuple(
                PriorOutput(numbered(count, numbers, block_size, start=self.prompt), ended)
                for (count, ended), numbers in zip(self.prior, blocks, strict=True)
            ),
            estimate=None if self.estimate is None else LengthEstimate(*self.estimate),
            tenant=self.tenant,
            prompt_logprobs=0 if self.prompt_logprobs else None,
            bypass_cache=self.bypass_cache,
        )


# -- The calls, named as in DecodeScheduler and PrefillScheduler --------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    """`submit(request, now)`; `refused` if it raised."""

    now: float
    request: RequestRecord
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Reserve:
    """`reserve(request, now)`; `refused` if it raised."""

    now: float
    request: RequestRecord
    refused: bool = False


@dataclass(frozen=True, slots=True)
class Arrived:
    """`arrived(sequence, first_token, now)`, with the id of the request that was reserved."""

    now: float
    request_id: str
    first_token: int  # as in Apply


@dataclass(frozen=True, slots=True)
class Lost:
    """`lost(sequence, first_token, now)`, with the id of the request that was reserved."""

    now: float
    request_id: str
    first_token: int  # as in Apply


@dataclass(frozen=True, slots=True)
class Abort:
    """`abort(request_id, now)`."""

    now: float
    request_id: str


@dataclass(frozen=True, slots=True)
class AbortSequence:
    """`abort_sequence(request_id, index)`."""

    request_id: str
    index: int


@dataclass(frozen=True, slots=True)
class Quiet:
    """`quiet(sequence)`, with the id of the request that was reserved."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Release:
    """`release(blocks)` of a prefill scheduler."""

    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """`plan(now)`, and what it returned: `digest` is that of `plan_digest`, None if there was
    nothing to run; the rest is for people who look for the difference between two runs."""

    now: float
    digest: str | None
    chunks: int = 0
    tokens: int = 0
    swaps_out: int = 0
    swaps_in: int = 0

    @classmethod
    def of(cls, plan: StepPlan | None, now: float) -> Plan:
        """The record of a plan."""
        if plan is None:
            return cls(now, None)
        counts = (len(plan.chunks), plan.tokens, len(plan.swap_out), len(plan.swap_in))
        return cls(now, plan_digest(plan), *counts)


@dataclass(frozen=True, slots=True)
class Apply:
    """`apply(plan, result, now)` of the last plan. `sampled` has one entry per chunk: GOES_ON,
    STOPS, the number of the block that the token fills, or None where the chunk did not sample;
    `seconds` and `swapped` are the result's."""

    now: float
    seconds: float
    sampled: tuple[int | None, ...]
    swapped: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fail:
    """`fail(plan, now)` of the last plan."""

    now: float


Record = (
    Submit
    | Reserve
    | Arrived
    | Lost
    | Abort
    | AbortSequence
    | Quiet
    | Release
    | Plan
    | Apply
    | Fail
)

_CALLS: dict[str, type[Record]] = {kind.__name__.lower(): kind for kind in get_args(Record)}


def token_of(request: Request, generated: int, token_id: int) -> int:
    """STOPS if `token_id`, as output token number `generated` (from 1), is one that `request`
    stops at; GOES_ON otherwise, also where max_tokens ends it."""
    stopping = request.stopping
    stops = token_id in stopping.eos_token_ids or token_id in stopping.stop_token_ids
    return STOPS if stops and generated > stopping.min_tokens else GOES_ON


def plan_digest(plan: StepPlan) -> str:
    """The same for two plans that run the same chunks in the same blocks and swap the same."""
    content = (
        [_chunk(chunk) for chunk in plan.chunks],
        [_swap(swap) for swap in plan.swap_out],
        [_swap(swap) for swap in plan.swap_in],
        plan.swaps_first,
    )
    return hashlib.blake2b(repr(content).encode(), digest_size=8).hexdigest()


def _chunk(chunk: Chunk) -> tuple[object, ...]:
    sequence = chunk.sequence
    return (*sequence.id, chunk.start, chunk.length, chunk.sample, sequence.blocks)


def _swap(swap: Swap) -> tuple[object, ...]:
    return (swap.number, *swap.sequence.id, swap.device, swap.host)


# -- Lines -------------------------------------------------------------------------------------


def header_line(header: RunHeader) -> str:
    """The first line of a file, without its end."""
    return _dumps(asdict(header))


def read_header(line: str) -> RunHeader:
    """The header of a first line. Raises ValueError for one that this version cannot read."""
    content = json.loads(line)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"not a recorded run of version {VERSION}")
    return RunHeader(
        role=content["role"],
        capacity=Capacity(**content["capacity"]),
        settings=content["settings"],
        cost=LinearCost(**content["cost"]),
    )


def record_line(record: Record) -> str:
    """One line, without its end. Fields that have their default value are left out."""
    return _dumps({"call": type(record).__name__.lower(), **_without_defaults(record)})


def read_record(line: str) -> Record:
    """The record of a line. Raises ValueError, KeyError or TypeError for what is not one."""
    content = json.loads(line)
    kind = _CALLS[content.pop("call")]
    if "request" in content:
        content["request"] = RequestRecord(**_tuples(content["request"]))
    return kind(**_tuples(content))


def read_run(lines: Iterable[str]) -> tuple[RunHeader, Iterator[Record]]:
    """The header, and the records as they are asked for."""
    rest = iter(lines)
    return read_header(next(rest)), (read_record(line) for line in rest)


def _dumps(content: dict[str, Any]) -> str:
    return json.dumps(content, separators=(",", ":"))


def _without_defaults(record: Record | RequestRecord) -> dict[str, Any]:
    values = ((field, getattr(record, field.name)) for field in fields(record))
    return {
        field.name: _without_defaults(value) if isinstance(value, RequestRecord) else value
        for field, value in values
        if value != field.default
    }


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {name: _tuple(value) for name, value in content.items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(each) for each in value) if isinstance(value, list) else value
