"""One sequence of tokens on its way through a worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto

from baton.types import Finish, FinishReason, Request


class Phase(Enum):
    """Where a sequence stands. Legal moves are in `Sequence.move`.

    Loops over all sequences keep the member that they compare with in a variable: to look one up
    in an enum takes longer than the rest of such a loop.
    """

    WAITING = auto()  # holds no blocks; wants some
    INCOMING = auto()  # holds blocks that a KV transfer is filling; not schedulable
    RUNNING = auto()  # holds blocks and may be in a batch
    LEAVING = auto()  # its KV is being copied to host blocks; holds both kinds; not schedulable
    SWAPPED = auto()  # its KV is in host blocks only
    RETURNING = auto()  # its KV is being copied back; in a batch only if the pass waits for that
    FINISHED = auto()  # holds nothing, never comes back


_MOVES = {
    Phase.WAITING: {Phase.RUNNING, Phase.INCOMING, Phase.FINISHED},
    Phase.INCOMING: {Phase.RUNNING, Phase.WAITING, Phase.FINISHED},
    Phase.RUNNING: {Phase.WAITING, Phase.LEAVING, Phase.FINISHED},
    Phase.LEAVING: {Phase.SWAPPED, Phase.FINISHED},
    Phase.SWAPPED: {Phase.RETURNING, Phase.FINISHED},
    Phase.RETURNING: {Phase.RUNNING, Phase.FINISHED},
    Phase.FINISHED: set(),
}


class Standing(IntEnum):
    """Who goes before the others of its priority class, whatever the policy's own order."""

    STARVED = 0  # waited too long; until it has had a quantum
    URGENT = 1  # would miss its deadline otherwise
    ORDINARY = 2


Rank = tuple[int, int, float, float, str, int]
"""Lowest first: (-priority class, standing, the policy's own measure, arrival, request id, index).
Total."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and output tokens of one sequence, and how far its KV has been computed.

    There is no prefill phase and no decode phase: a sequence wants `computed` to reach
    `len(tokens)`; when a chunk gets it there, the pass samples one more token. Owned by one
    scheduler at a time, which alone changes it, and only between passes.
    """

    # Set by whoever submits it.
    request: Request
    index: int
    tokens: list[int]
    arrived_at: float  # at the gateway, on this worker's clock

    # Set by the scheduler.
    computed: int = 0  # tokens whose KV is in `blocks`
    blocks: list[int] = field(default_factory=list)  # block table by position; it grows in place
    host_blocks: list[int] = field(default_factory=list)  # the same, of its copy in host memory
    allotment: int = 0  # output tokens that KV is reserved for; 0: as many as there are
    phase: Phase = Phase.WAITING
    finish: Finish | None = None
    preemptions: int = 0
    keys: list[bytes] = field(default_factory=list)  # of its first full blocks (baton/prefix.py)
    kept: int = 0  # blocks, from the first, that others can find, or that it has found itself
    cached: int = 0  # tokens whose KV it has from others, or would have: as was last looked up

    # Set by the policy.
    level: int = 0  # MLFQ level, 0 first
    served: float = 0.0  # seconds of passes charged to it in this level
    waiting_since: float = 0.0  # when it last ran, or arrived
    standing: Standing = Standing.ORDINARY
    credit: float = 0.0  # seconds of passes for which it still counts as starved
    expected: float = 0.0  # output tokens, as predicted
    rank: Rank | None = None  # its place; None: not known since something changed

    prompt_length: int = field(init=False)  # tokens of the prompt

    def __post_init__(self) -> None:
        self.prompt_length = len(self.request.prompt_ids)

    @classmethod
    def start(cls, request: Request, index: int, now: float) -> Sequence:
        """Sequence `index` of `request`, with what earlier attempts generated already in it."""
        prior = request.prior(index)
        return cls(
            request=request,
            index=index,
            tokens=[*request.prompt_ids, *prior.token_ids],
            arrived_at=now - request.waited,
            level=request.level,
            waiting_since=now,
        )

    @property
    def id(self) -> tuple[str, int]:
        """Unique in a worker."""
        return (self.request.id, self.index)

    @property
    def generated(self) -> int:
        """Output tokens so far, those of earlier attempts included."""
        return len(self.tokens) - self.prompt_length

    @property
    def uncomputed(self) -> int:
        """Tokens that passes must still cover before the next one can be sampled; at least 1."""
        return len(self.tokens) - self.computed

    @property
    def to_compute(self) -> int:
        """The same, without those whose KV it would have from others."""
        return len(self.tokens) - max(self.computed, self.cached)

    @property
    def generating(self) -> bool:
        """True when one more token of KV gives the next output token."""
        tokens = len(self.tokens)
        return tokens - self.computed == 1 and tokens > self.prompt_length

    def move(self, phase: Phase) -> None:
        """Change phase; a move that is not in the table is a bug in the caller."""
        if phase not in _MOVES[self.phase]:
            raise RuntimeError(f"sequence {self.id}: {self.phase.name} -> {phase.name}")
        self.phase = phase

    def append(self, token_id: int) -> Finish | None:
        """Take a sampled token; returns how the sequence ends with it, or None if it goes on."""
        self.tokens.append(token_id)
        stopping = self.request.stopping
        generated = len(self.tokens) - self.prompt_length
        if generated > stopping.min_tokens:
            if token_id in stopping.eos_token_ids:
                return Finish(FinishReason.STOP, token_id, is_eos=True)
            if token_id in stopping.stop_token_ids:
                return Finish(FinishReason.STOP, token_id)
        if generated >= stopping.max_tokens:
            return Finish(FinishReason.LENGTH)
        return None
