"""Swapping in virtual time: bytes that really move, when a copy at a fixed speed would end.

Copies in one direction queue behind each other; the two directions do not disturb each other. A
copy spoils its destination when it is asked for, and reads its source only when it ends, so
whoever uses either too early gets wrong bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduling.plan import StepPlan, Swap

_SPOILED = -2  # never a token


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Some blocks of a pool [blocks, block_size]."""

    pool: NDArray[np.int32]
    numbers: tuple[int, ...]

    def fill(self, values: NDArray[np.int32] | int) -> None:
        """Overwrite them."""
        self.pool[list(self.numbers)] = values

    def read(self) -> NDArray[np.int32]:
        """A copy of what they hold."""
        return self.pool[list(self.numbers)]


@dataclass(frozen=True, slots=True)
class _Copy:
    """A swap on its way, and when it ends."""

    number: int
    source: _Blocks
    target: _Blocks
    end: float


class SimulatedSwaps:
    """A host pool beside a device pool, and the copies between them."""

    def __init__(
        self, device: NDArray[np.int32], host_blocks: int, seconds_per_block: float
    ) -> None:
        """`device` is [blocks, block_size]; `seconds_per_block` holds for either direction."""
        self._device = device
        self._host = np.full((host_blocks, device.shape[1]), -1, np.int32)
        self._seconds_per_block = seconds_per_block
        self._copies: list[_Copy] = []  # unfinished, in the order in which they were asked for
        self._out_idle_at = self._in_idle_at = 0.0  # when the queue of a direction is empty

    def begin(self, plan: StepPlan, now: float) -> float:
        """Queue the swaps of a plan that begins `now`. Returns when the last of them will end, or
        `now` without any. With `swaps_first` those in wait for those out."""
        asked = len(self._copies)
        outs_end = now
        for swap in plan.swap_out:
            outs_end = self._out_idle_at = self._end_of(swap, max(now, self._out_idle_at))
            self._copies.append(_Copy(swap.number, *self._ends_of(swap), outs_end))
        end = outs_end
        start = outs_end if plan.swaps_first else now
        for swap in plan.swap_in:
            ins_end = self._in_idle_at = self._end_of(swap, max(start, self._in_idle_at))
            host, device = reversed(self._ends_of(swap))
            self._copies.append(_Copy(swap.number, host, device, ins_end))
            end = max(end, ins_end)
        if not plan.swaps_first:  # there a swap in may share blocks with a swap out before it
            for copy in self._copies[asked:]:
                copy.target.fill(_SPOILED)
        return end

    def next_end(self) -> float | None:
        """When the next unfinished copy ends; None without any."""
        return min((copy.end for copy in self._copies), default=None)

    def land(self, now: float) -> tuple[int, ...]:
        """Let every copy that ends by `now` end, in order; the numbers of their swaps."""
        ended = sorted((c for c in self._copies if c.end <= now), key=lambda c: c.end)
        self._copies = [c for c in self._copies if c.end > now]
        for copy in ended:
            copy.target.fill(copy.source.read())
        return tuple(copy.number for copy in ended)

    def _end_of(self, swap: Swap, start: float) -> float:
        return start + len(swap.device) * self._seconds_per_block

    def _ends_of(self, swap: Swap) -> tuple[_Blocks, _Blocks]:
        """Where its KV is on the device, and in the host pool."""
        return _Blocks(self._device, swap.device), _Blocks(self._host, swap.host)
