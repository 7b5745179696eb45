"""What gateways and workers ask of the shared queue.

    Q(level) --claim--> P(worker, fence) --handoff--> D(worker, new fence) --> finished | error
       ^------- reap / yield (fence + 1, progress kept, attempts bounded) --'
    cancelled, timed out: from any live state; end states absorb everything

A claim for a decode worker (local prefill) goes from Q to D at once. Every operation is
idempotent: repeating it after a lost reply gives the same answer. All durations are in seconds;
time is the server's. Every method raises QueueError when the server cannot be reached in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from baton.types import Claim, Load


class Role(Enum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"


class Outcome(Enum):
    """End states of a request."""

    FINISHED = "F"
    ERROR = "E"
    CANCELLED = "C"
    TIMED_OUT = "T"


@dataclass(frozen=True, slots=True)
class Submission:
    """What the queue knows of a request: numbers only. `cached_tokens` need no prefill.
    `max_tokens` is the longest output, of all its sequences together.

    `cost` is the service it is expected to take, in seconds, divided by the tenant's weight where
    tenants have some: tenants take turns by it. It counts on `expected_tokens` of output at
    `token_cost` seconds each, and is corrected by what the request generates. `handicap` is by how
    many seconds a younger request may stand before it. `predicted_tokens` is the output that the
    order counts on: the request sinks a level when it has outlived that, and again at each double,
    not by quanta of service.
    """

    request_id: str
    tenant: str
    prompt_tokens: int
    max_tokens: int
    cached_tokens: int = 0
    priority: int = 0
    time_to_live: float | None = None
    handicap: float = 0.0
    cost: float = 1.0
    predicted_tokens: int | None = None
    token_cost: float = 0.0
    expected_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Claimed:
    """A request given to a worker. `generated` tokens are known to the queue already."""

    request_id: str
    claim: Claim
    level: int
    generated: int


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """A live worker. `epoch` changes at each registration, so a restarted worker is a new one."""

    id: str
    epoch: int
    role: Role
    address: str
    layout_digest: str  # KV layout; gateways pair only workers with equal ones
    model: str  # fingerprint of the weights
    capacity_tokens: int  # prompt tokens that may be claimed for it at once
    capacity_blocks: int
    max_context: int
    draining: bool
    load: Load | None = None  # last reported
    weight_dtype: str = ""  # number formats
    kv_dtype: str = ""
    batch_sequences: int | None = None  # most in one pass; None: it did not say
    prefix_block_size: int = 0  # tokens per block of its prefix cache; 0: it keeps none


@dataclass(frozen=True, slots=True)
class Registration:
    """What a worker says of itself when it starts."""

    id: str
    role: Role
    address: str
    layout_digest: str
    model: str
    capacity_tokens: int
    capacity_blocks: int
    max_context: int
    weight_dtype: str = ""
    kv_dtype: str = ""
    batch_sequences: int | None = None
    prefix_block_size: int = 0


class Verdict(Enum):
    """What a worker must do with a request it reported on."""

    CONTINUE = "="
    STALE = "S"  # somebody else has it now: drop it, emit nothing
    CANCELLED = "X"  # stop


@dataclass(frozen=True, slots=True)
class Progress:
    """One request in a worker's batched report: output tokens and seconds of service so far."""

    request_id: str
    fence: int
    generated: int
    served: float


@dataclass(frozen=True, slots=True)
class ProgressReply:
    """`level` is the request's MLFQ level after accounting."""

    verdict: Verdict
    level: int


@dataclass(frozen=True, slots=True)
class Reaped:
    """What sweeps found: this gateway's requests that went back to the queue, ended in error
    after too many attempts, or passed their deadline (the gateway must finish those: they are
    named until it does); and all workers that expired in this sweep."""

    requeued: tuple[str, ...]
    failed: tuple[str, ...]
    timed_out: tuple[str, ...]
    workers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LevelDepth:
    """One MLFQ level of the queue."""

    level: int
    requests: int
    tokens: int
    oldest: float  # age in seconds of the oldest, 0 when empty


@dataclass(frozen=True, slots=True)
class Live:
    """A request that a gateway holds, as it tells reconcile after the server lost its data.

    `age` is in seconds since its submission: the order of all gateways' requests comes back.
    """

    submission: Submission
    level: int
    generated: int
    worker_id: str | None  # None: waiting
    claim: Claim | None
    age: float = 0.0


class GatewayQueue(Protocol):
    """A gateway's side."""

    async def submit(self, submission: Submission) -> int:
        """Queue a request at its skip-join level and return that level.

        Raises Overloaded (queue full, token cap, tenant quota) and AlreadyExists.
        """
        ...

    async def claim(
        self,
        worker: WorkerRecord,
        limit: int,
        tenants: Sequence[str] = (),
        *,
        only: str | None = None,
    ) -> list[Claimed]:
        """Take up to `limit` of this gateway's own requests for `worker`, within the worker's free
        token capacity: highest priority first, tenants in turn, and of a tenant's by level and
        age plus handicap. The order is global: requests of
        other gateways that stand ahead are left to them, and the capacity they will need is
        left too. Empty when the worker drains or is gone (then the caller refreshes).
        With `tenants`, as if nobody else's requests waited: for places that are open to them
        only. With `only`, as if this gateway had no other request than that one."""
        ...

    async def next_up(self, limit: int, tenants: Sequence[str] = ()) -> list[str]:
        """Ids of up to `limit` of this gateway's own requests, in the order in which they would be
        claimed by a worker with room for all. With `tenants`, of theirs."""
        ...

    async def handoff(self, request_id: str, claim: Claim, to: WorkerRecord) -> Claim | None:
        """Move a request from its prefill worker to decode worker `to` under a new fence.
        None when the claim is stale, the request has ended or `to` is gone."""
        ...

    async def give_back(
        self, request_id: str, claim: Claim, generated: int, *, fault: bool
    ) -> bool:
        """Return a claimed request to its level, in its old place (`yield` in the drawing).
        `fault` counts an attempt against it. False when the claim is stale, the request has
        ended, or its attempts are used up (then it ended in error)."""
        ...

    async def finish(
        self, request_id: str, outcome: Outcome, generated: int, claim: Claim | None = None
    ) -> bool:
        """End a request. With a claim, only if it is current; without, always (cancel, time-out).
        False when it had ended before, is unknown or another gateway's, or the claim is stale."""
        ...

    def measured(self, prefill_base: float, prefill_per_token: float) -> None:
        """What a first iteration costs, in seconds, as the workers measure it: skip-join uses it
        in place of the settings' guess. The server learns it with the next heartbeat."""
        ...

    async def workers(self) -> list[WorkerRecord]:
        """All live workers."""
        ...

    async def depth(self) -> list[LevelDepth]:
        """The queue by level."""
        ...

    async def promote(self) -> int:
        """Lift requests that waited too long to level 0, and those whose deadline is near before
        all levels; returns how many."""
        ...

    async def reap(self) -> Reaped:
        """Expire workers, leases, gateways and deadlines. Any gateway may call it, at any time;
        each learns of its own requests, whoever swept them."""
        ...

    async def reconcile(self, live: Sequence[Live]) -> int:
        """Recreate what the server lost, or ended because this gateway was silent for too long;
        live records are left alone. Returns how many."""
        ...

    async def heartbeat(self) -> bool:
        """This gateway is alive. Requests of a gateway that is not are reaped. False when the
        server did not know it (restarted empty, or it was silent): the caller reconciles."""
        ...


class WorkerQueue(Protocol):
    """A worker's side. It registers once it is warm."""

    async def register(self) -> int:
        """Enter the registry and return the epoch. Requests of an earlier incarnation are
        requeued."""
        ...

    async def report(self, progress: Sequence[Progress], load: Load) -> list[ProgressReply] | None:
        """One batched report: renews the worker, its requests' leases and levels. None when the
        registry no longer knows this epoch: the worker registers anew."""
        ...

    async def drain(self) -> None:
        """Take no new claims."""
        ...

    async def deregister(self) -> None:
        """Leave the registry; what it held is requeued."""
        ...
