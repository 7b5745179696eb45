"""Runs plans by a cost model alone: no KV, no tokens but "ends" and "goes on". Fast.

engine/simulated.py is the other one: there the KV bytes are real and wrong blocks give wrong
tokens. Here only time is, and every job ends at its true length.
"""

from __future__ import annotations

from scheduling.cost import LinearCost, Work
from scheduling.plan import Sampled, StepPlan, StepResult, Swap
from scheduling.sequence import Sequence
from scheduling.simulator.traffic import EOS, PLAIN

_ENDS = Sampled(EOS)
_GOES_ON = Sampled(PLAIN)


class SwapLink:
    """The link between device and host memory: two queues, one per direction, in order.

    Times are absolute, in seconds of the simulation.
    """

    def __init__(self, seconds_per_block: float) -> None:
        """`seconds_per_block` each way."""
        self._seconds_per_block = seconds_per_block
        self._out_free_at = 0.0
        self._in_free_at = 0.0
        self._ends: dict[int, float] = {}  # when each unfinished swap ends, by its number

    def begin(self, plan: StepPlan, now: float) -> float:
        """Queue the swaps of a plan; returns when the last of them ends, `now` without any. With
        `swaps_first` those in wait for those out, whose blocks they may use."""
        outs = self._queue(plan.swap_out, max(now, self._out_free_at))
        self._out_free_at = outs if plan.swap_out else self._out_free_at
        ready = outs if plan.swaps_first and plan.swap_out else now
        ins = self._queue(plan.swap_in, max(ready, self._in_free_at))
        self._in_free_at = ins if plan.swap_in else self._in_free_at
        return max([now, *(self._ends[s.number] for s in (*plan.swap_out, *plan.swap_in))])

    def next_end(self) -> float | None:
        """When the first of the unfinished swaps ends."""
        return min(self._ends.values(), default=None)

    def ended(self, now: float) -> tuple[int, ...]:
        """The swaps that have ended by `now`, each named once."""
        if not self._ends:
            return ()
        numbers = tuple(number for number, end in self._ends.items() if end <= now)
        for number in numbers:
            del self._ends[number]
        return numbers

    def _queue(self, swaps: tuple[Swap, ...], start: float) -> float:
        for swap in swaps:
            start += len(swap.device) * self._seconds_per_block
            self._ends[swap.number] = start
        return start


class CostExecutor:
    """One worker's device. `stall_seconds`: time in which nothing was computed because swaps had
    to end first. `prompt_tokens`: those in the chunks of all passes."""

    def __init__(self, cost: LinearCost, *, swap_seconds_per_block: float = 0.0) -> None:
        self.cost = cost
        self.link = SwapLink(swap_seconds_per_block)
        self.stall_seconds = 0.0
        self.prompt_tokens = 0
        self._length_at_end: dict[Sequence, int] = {}

    def expect(self, sequence: Sequence, output_tokens: int) -> None:
        """The sequence will end with output token number `output_tokens`."""
        self._length_at_end[sequence] = sequence.prompt_length + output_tokens

    def forget(self, sequence: Sequence) -> None:
        """It has ended or left."""
        del self._length_at_end[sequence]

    def remaining(self, sequence: Sequence) -> int:
        """Output tokens that are still to come; at least 1 while the sequence lives."""
        return self._length_at_end[sequence] - len(sequence.tokens)

    def shortest(self, plan: StepPlan) -> int:
        """The fewest that are still to come of any of its sequences; 0 without sequences."""
        at_end, chunks = self._length_at_end, plan.chunks
        return min([at_end[c[0]] - len(c[0].tokens) for c in chunks]) if chunks else 0

    def after(self, plan: StepPlan, passes: int) -> tuple[int, ...]:
        """The token that each sequence of a generation pass samples in the last of so many."""
        at_end = self._length_at_end
        return tuple(
            [
                EOS if len(sequence.tokens) + passes >= at_end[sequence] else PLAIN
                for sequence, _, _, _ in plan.chunks
            ]
        )

    def execute(self, plan: StepPlan, now: float) -> StepResult:
        """Run a pass that begins `now`."""
        end = self.run(plan, now)
        sampled = self.sample(plan)
        return StepResult(sampled, ((),) * len(sampled), end - now, self.link.ended(end))

    def run(self, plan: StepPlan, now: float) -> float:
        """Begin a pass `now`; returns when it ends."""
        end = now
        if plan.swap_out or plan.swap_in:
            swapped_at = self.link.begin(plan, now)
            end = swapped_at if plan.swaps_first else now
        if plan.chunks:
            self.stall_seconds += end - now
            work = Work.of(plan)
            end += self.cost.seconds(work)
            self.prompt_tokens += work.prompt_tokens
        else:
            end = self._wait(end)
            self.stall_seconds += end - now
        return end

    def sample(self, plan: StepPlan) -> tuple[Sampled | None, ...]:
        """What each of its chunks gives."""
        at_end = self._length_at_end
        return tuple(
            [
                None
                if not sample
                else _ENDS
                if len(sequence.tokens) + 1 >= at_end[sequence]
                else _GOES_ON
                for sequence, _, _, sample in plan.chunks
            ]
        )

    def _wait(self, start: float) -> float:
        """A plan without chunks: until one swap, any, has ended."""
        first = self.link.next_end()
        if first is None:
            raise RuntimeError("a plan without chunks, and no swap to wait for")
        return max(start, first)
