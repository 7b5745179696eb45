"""The choices that a decode worker's scheduler is built with, besides the order of sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.config import DecodeConfig
from scheduling.plan import Capacity


@dataclass(frozen=True, slots=True)
class Rules:
    """One value each, so that one can be swapped for another on the same engine.

    `admission`: the KV that must be free before a sequence is let in. "paged": for the tokens it
    has; "reserve-max": for its longest output (Orca); "reserve-sum": for its allotment (S3);
    "reserve-predicted": for the peak that all are expected to reach (scheduling/reservations.py).

    `batching`: how prompts and generation share a pass. "splitfuse" (FastGen) or "prefill-first":
    whole prompts in passes of their own, while generation waits.

    `filling`: when sequences join the batch. "continuous": any pass; "static": when the batch is
    empty, as many as wait; "dynamic": when it is empty, and either full or `dynamic_wait` seconds
    have passed since the first one came.

    `preemption`: what becomes of the KV of a sequence that gives way. "recompute": thrown away;
    "swap": to host memory while there is room; "auto": whichever is measured to cost less.

    `swapping`: "proactive": ahead of need, beside the passes, keeping `swap_reserve` of the blocks
    free for bursts (FastServe); "reactive": when needed, and the pass waits for it.

    `ahead`: sequences have the block for the token after the newest one, too, if there are plenty,
    for an executor that begins a pass before it is planned.
    """

    admission: Literal["paged", "reserve-predicted", "reserve-sum", "reserve-max"] = "paged"
    batching: Literal["splitfuse", "prefill-first"] = "splitfuse"
    filling: Literal["continuous", "static", "dynamic"] = "continuous"
    dynamic_wait: float = 0.05
    preemption: Literal["recompute", "swap", "auto"] = "recompute"
    swapping: Literal["proactive", "reactive"] = "proactive"
    swap_reserve: float = 0.05
    ahead: bool = False

    def reserve(self, capacity: Capacity) -> int:
        """Blocks that proactive swapping keeps free."""
        return int(self.swap_reserve * capacity.blocks)

    @classmethod
    def of(cls, config: DecodeConfig) -> Rules:
        """What a worker's configuration asks for."""
        return cls(
            admission=config.admission,
            batching=config.batching,
            preemption=config.preemption,
            swapping=config.swapping,
            swap_reserve=config.swap_reserve,
            ahead=config.device != "cpu",
        )
