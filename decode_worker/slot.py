"""One request on this worker, from the gateway's StartRequest to its last token.

    start ──▶ RESERVED ──attach──▶ PULLING ──KV here (or lost) and activated──▶ DECODING ──▶ ENDED
      └─────────── local prefill ───────────────────────────────────────────────▲
    abort, stream end, time-out, stale fence: from any state to ENDED

Pages that a pull is writing stay out of the pool until the pull has ended, whatever happened to
the request meanwhile.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum, auto

from baton.types import Claim, Request
from decode_worker.link import Link
from kv_transfer.contract import PullReport
from scheduling.sequence import Sequence


class State(Enum):
    """Where a slot stands."""

    RESERVED = auto()
    PULLING = auto()
    DECODING = auto()
    ENDED = auto()


_MOVES = {
    State.RESERVED: {State.PULLING, State.ENDED},
    State.PULLING: {State.DECODING, State.ENDED},
    State.DECODING: {State.ENDED},
    State.ENDED: set(),
}


@dataclass(frozen=True, slots=True)
class Activation:
    """The hand-off is recorded: the claim to decode under, and sequence 0's first token."""

    claim: Claim
    first_token: int


@dataclass(slots=True, eq=False)
class Slot:
    """Owned by the worker; its sequences are owned by the scheduler."""

    # Set at start.
    link: Link
    number: int
    request_id: str  # the caller's, for Redis; the scheduler knows `request.id`
    request: Request
    claim: Claim
    state: State
    arrived_at: float

    # Set on the way.
    incoming: Sequence | None = None  # holds the reserved blocks until KV is there
    pull: asyncio.Task[None] | None = None
    kv: PullReport | Exception | None = None
    activation: Activation | None = None
    expiry: asyncio.TimerHandle | None = None
    open_sequences: set[int] = field(default_factory=set)  # indices that have not finished
    unwanted: set[int] = field(default_factory=set)  # of these: to be aborted when decoding begins
    generated: int = 0
    served: float = 0.0  # seconds of passes this request took part in
    levels: dict[int, int] = field(default_factory=dict)  # MLFQ level last seen, by index

    def move(self, state: State) -> None:
        """Change state; a move that is not in the drawing is a bug in the caller."""
        if state not in _MOVES[self.state]:
            raise RuntimeError(f"slot {self.number}: {self.state.name} -> {state.name}")
        self.state = state
