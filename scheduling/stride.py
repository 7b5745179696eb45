"""How many passes in a row are one plan moved on by a token each: the simulator's fast-forward.

Everything here may be too small, never too large: one pass is always a right answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from scheduling.choosing import Chooser
from scheduling.order import Policy
from scheduling.plan import Capacity, StepPlan
from scheduling.residency import Residency
from scheduling.rules import Rules
from scheduling.sequence import Sequence


def passes_alike(
    plan: StepPlan,
    now: float,
    seconds: float,
    most: int,
    *,
    capacity: Capacity,
    rules: Rules,
    policy: Policy,
    residency: Residency,
    chooser: Chooser,
    several: bool,
) -> int:
    """How many passes, up to `most`, the one of `plan` included, would have the same sequences in
    them if nothing came from outside, nobody stopped early and each took `seconds` from `now`
    on. `several`: tenants share the batch."""
    longest = min(most, _tokens_left(plan))
    if longest <= 1:
        return 1
    sequences = [chunk.sequence for chunk in plan.chunks]
    if chooser.gave_way or residency.swaps.in_flight or residency.swapped:
        return 1  # the next plan finds other blocks free than this one did
    spare = residency.blocks.free
    if chooser.proactive:
        reserve = rules.reserve(capacity)
        if spare >= reserve:
            spare -= reserve  # below it swaps begin
        elif len(residency.running) > len(sequences):
            return 1  # swaps may begin as soon as somebody can be spared for long
    if chooser.head is not None:
        if chooser.swaps or several:
            return 1  # room may be made for it, or another tenant's may be the head
        if rules.admission == "reserve-predicted":
            longest = min(longest, _passes_without_room(chooser.head, len(sequences), residency))
    if longest > 1:
        longest = _passes_with_room(sequences, longest, spare, capacity, residency)
    if longest > 1:
        here = set(sequences)
        others: Iterable[Sequence] = (s for s in chooser.ranked if s not in here)
        if several:
            # Shares count how many go before one of its own tenant: as long as nobody of a pass
            # falls behind anybody else, whoever's, they stay the same.
            others = sorted(others, key=policy.rank)
        longest = _passes_in(policy.steady(sequences, others, now, seconds), seconds, longest)
    return longest


def passes_before(
    plan: StepPlan, newcomer: Sequence, now: float, seconds: float, passes: int, policy: Policy
) -> int:
    """How many of so many passes, in which all places are taken by sequences that go before it,
    remain if `newcomer` waits, too."""
    chosen = [chunk.sequence for chunk in plan.chunks]
    return _passes_in(policy.steady(chosen, [newcomer], now, seconds), seconds, passes)


def _tokens_left(plan: StepPlan) -> int:
    """Passes until the first of its sequences has all its tokens, or has used up its allotment; 1
    if any of them does not generate, or there is none."""
    fewest = None
    for sequence, _, _, _ in plan.chunks:
        tokens, prompt = len(sequence.tokens), sequence.prompt_length
        if tokens - sequence.computed != 1 or tokens <= prompt:
            return 1
        most, allotment = sequence.request.stopping.max_tokens, sequence.allotment
        left = (allotment if 0 < allotment < most else most) - (tokens - prompt)
        if fewest is None or left < fewest:
            fewest = left
    return max(1, fewest or 1)


def _passes_in(steady: float, seconds: float, most: int) -> int:
    """Passes, up to `most`, before the order may change; what changes when a pass ends counts for
    the next one."""
    if steady >= most * seconds:
        return most
    return max(1, math.ceil(steady / seconds))


def _passes_without_room(head: Sequence, advancing: int, residency: Residency) -> int:
    """Passes in which the forecast leaves no room for `head`. With each pass the peak may get lower
    by a token for every sequence that does not advance, as that one is shorter when the others
    end."""
    still = 1 + len(residency.running) + len(residency.incoming) - advancing
    return max(0, residency.reservations.excess(head) - 1) // still + 1


def _passes_with_room(
    sequences: list[Sequence], most: int, spare: int, capacity: Capacity, residency: Residency
) -> int:
    """Passes, up to `most`, for which the blocks suffice: `spare` for all together, of which those
    without an allotment leave alone what is reserved for the others."""
    room = residency.reservations.room(residency.blocks.free)
    size = capacity.block_size
    if len(sequences) * capacity.blocks_for(most) <= min(spare, room):
        return most  # even if all of them had to begin a new block at once
    slack = np.array([len(s.blocks) * size - len(s.tokens) for s in sequences])
    unreserved = np.array([not s.allotment for s in sequences])

    def fits(passes: int) -> bool:
        wanted = np.maximum(0, -(-(passes - 1 - slack) // size))
        return bool(wanted.sum() <= spare and wanted[unreserved].sum() <= max(room, 0))

    if fits(most):
        return most
    fewest = 1  # fits; `most` does not
    while most - fewest > 1:
        middle = (fewest + most) // 2
        fewest, most = (middle, most) if fits(middle) else (fewest, middle)
    return fewest
