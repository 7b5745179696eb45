"""KV on its way between device and host memory: host blocks, unfinished swaps, how long they take.

A swap holds its blocks on both sides from its plan until a `StepResult` names it, whatever happens
to its sequence. Then the side it came from is free, and so is the other if the sequence has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from scheduling.blocks import BlockAllocator
from scheduling.cost import LinearCost, Work
from scheduling.plan import Capacity, Swap
from scheduling.sequence import Phase, Sequence

SECONDS_PER_BLOCK = 0.0001
"""Taken for granted until a swap was measured: 2 MiB (16 tokens of an 8B model) at 20 GB/s."""

_WEIGHT = 0.2  # of the newest measurement in the moving average


@dataclass(frozen=True, slots=True)
class _Flight:
    """An unfinished swap. `queue` counts its blocks and those before it in its direction."""

    swap: Swap
    out: bool
    begun_at: float
    queue: int


class SwapBook:
    """The host pool and every unfinished swap. Moves no bytes and no sequences: it is told."""

    def __init__(self, capacity: Capacity, device: BlockAllocator) -> None:
        self.host = BlockAllocator(capacity.host_blocks)
        self.seconds_per_block = SECONDS_PER_BLOCK  # a moving average
        self._capacity = capacity
        self._device = device
        self._flights: dict[int, _Flight] = {}
        self._planned: list[_Flight] = []  # for the plan that is being made
        self._next = 0
        self._moving = {True: 0, False: 0}  # blocks of unfinished swaps: out, in

    # -- Facts -----------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Unfinished swaps."""
        return len(self._flights)

    @property
    def pending(self) -> bool:
        """Whether any has begun that no plan has taken along."""
        return bool(self._planned)

    @property
    def outs(self) -> int:
        """Blocks of unfinished swaps out."""
        return self._moving[True]

    @property
    def blocks(self) -> int:
        """Blocks of all unfinished swaps."""
        return self._moving[True] + self._moving[False]

    def coming_free(self) -> int:
        """Device blocks that will be free when the swaps out are complete."""
        return sum(
            len(self._device.sole(flight.swap.device))
            for flight in self._flights.values()
            if flight.out
        )

    def has_room(self, sequence: Sequence) -> bool:
        """Whether the host pool takes its KV. There must be some."""
        return 0 < self._capacity.blocks_for(sequence.computed) <= self.host.free

    def costs_less(self, sequence: Sequence, cost: LinearCost) -> bool:
        """Whether its KV is sooner out and back again than computed a second time."""
        tokens = sequence.computed
        work = Work(prompt_tokens=tokens, attention=tokens * tokens)
        # Computed among others it does not cost a pass of its own.
        return self.there_and_back(sequence) < cost.seconds(work) - cost.base

    def there_and_back(self, sequence: Sequence) -> float:
        """Seconds until its KV would be out and in again, behind the swaps that are under way."""
        blocks = 2 * self._capacity.blocks_for(sequence.computed) + self.blocks
        return self.seconds_per_block * blocks

    # -- Swaps -----------------------------------------------------------------------------

    def out(self, sequence: Sequence, now: float) -> None:
        """Begin to copy the KV of `sequence` to the host. Its device blocks become the swap's,
        but for those without KV, which are free."""
        kept = self._capacity.blocks_for(sequence.computed)
        self._device.release(sequence.blocks[kept:])
        sequence.blocks = sequence.blocks[:kept]
        sequence.host_blocks = self.host.allocate(kept)
        self._begin(sequence, sequence.blocks, now, out=True)

    def back(self, sequence: Sequence, now: float) -> None:
        """Begin to copy it into the first of its new device blocks, after those that it shares. Its
        host blocks, and those that the copy fills, are the swap's until it is complete."""
        end = sequence.kept + len(sequence.host_blocks)
        self._begin(sequence, sequence.blocks[sequence.kept : end], now, out=False)

    def _begin(self, sequence: Sequence, device: list[int], now: float, *, out: bool) -> None:
        host = sequence.host_blocks
        swap = Swap(self._next, sequence, tuple(device), tuple(host))
        self._next += 1
        self._moving[out] += len(host)
        flight = _Flight(swap, out, now, self._moving[out])
        self._flights[swap.number] = flight
        self._planned.append(flight)

    def planned(self) -> tuple[tuple[Swap, ...], tuple[Swap, ...]]:
        """The swaps out, and in, that have begun since the last call."""
        if not self._planned:
            return (), ()
        planned, self._planned = self._planned, []
        return (
            tuple(flight.swap for flight in planned if flight.out),
            tuple(flight.swap for flight in planned if not flight.out),
        )

    def complete(
        self, numbers: Iterable[int], arrive: Callable[[Swap], None], now: float, computing: float
    ) -> None:
        """These swaps are complete. Blocks are freed, those of a sequence that has ended on both
        sides; `arrive` is called for every other one. `computing`: seconds before `now` in which
        the pass computed that waited for its swaps."""
        ended = [self._end(number) for number in numbers]
        self._measure(ended, now - computing)
        for flight in ended:
            swap, gone = flight.swap, flight.swap.sequence.phase is Phase.FINISHED
            if flight.out or gone:
                self._device.release(swap.device)
            if not flight.out or gone:
                self.host.release(swap.host)
            if not gone:
                arrive(swap)

    def _end(self, number: int) -> _Flight:
        flight = self._flights.pop(number, None)
        if flight is None:
            raise RuntimeError(f"swap {number} is not under way")
        self._moving[flight.out] -= len(flight.swap.host)
        return flight

    def _measure(self, ended: list[_Flight], now: float) -> None:
        """The one with the longest queue tells most: the ends of the others were only seen now."""
        if ended:
            slowest = max(ended, key=lambda flight: flight.queue)
            seconds = max(0.0, now - slowest.begun_at) / slowest.queue
            self.seconds_per_block += _WEIGHT * (seconds - self.seconds_per_block)

    # -- Checks ----------------------------------------------------------------------------

    def device_blocks(self) -> list[tuple[int, ...]]:
        """The device blocks that the swaps hold."""
        return [flight.swap.device for flight in self._flights.values()]

    def sequences(self) -> set[Sequence]:
        """The sequences on their way that have not ended."""
        moving = {flight.swap.sequence for flight in self._flights.values()}
        return {s for s in moving if s.phase is not Phase.FINISHED}

    def check_integrity(self, swapped: Iterable[Sequence]) -> None:
        """Raise RuntimeError if a host block is lost or owned twice, or a swap has gone astray."""
        held = [s.host_blocks for s in swapped]
        self.host.check_integrity([*held, *(f.swap.host for f in self._flights.values())])
        for flight in self._flights.values():
            phase = flight.swap.sequence.phase
            expected = Phase.LEAVING if flight.out else Phase.RETURNING
            if phase not in (expected, Phase.FINISHED):
                raise RuntimeError(f"swap {flight.swap.number} of a {phase.name} sequence")
        moving = dict.fromkeys(self._moving, 0)
        for flight in self._flights.values():
            moving[flight.out] += len(flight.swap.host)
        if moving != self._moving:
            raise RuntimeError("blocks on their way miscounted")
