"""An executor without a model: KV that is real, time that is a cost model's.

The "KV" of a token is its id, four bytes, written to its place in the sequence's blocks; the next
token is a function of what those blocks hold. So a wrong block table, a block that is reused too
early or a hand-off that loses bytes gives wrong tokens here as it would in a model. For tests of
schedulers, workers and the hand-off, and for the simulator.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baton.types import Logprob, Request
from engine.simulated_swap import SimulatedSwaps
from scheduling.cost import LinearCost
from scheduling.plan import Capacity, Chunk, Sampled, StepPlan, StepResult

TokenOf = Callable[[Request, int, bytes], int]
"""(request, sequence index, KV of all tokens so far as int32) to the next token id."""


def checksum_token(vocabulary: int) -> TokenOf:
    """The usual TokenOf: depends on every token before it, on the seed and on the index."""

    def token_of(request: Request, index: int, kv: bytes) -> int:
        return zlib.crc32(kv, (request.sampling.seed + index) & 0xFFFFFFFF) % vocabulary

    return token_of


def expected_tokens(request: Request, index: int, token_of: TokenOf) -> list[int]:
    """What a correct run generates, stop tokens aside, for sequence `index` from the beginning."""
    tokens = list(request.prompt_ids)
    for _ in range(request.stopping.max_tokens):
        tokens.append(token_of(request, index, np.array(tokens, np.int32).tobytes()))
    return tokens[len(request.prompt_ids) :]


class BlockBytes:
    """The pool as a KV transfer sees it (kv_transfer.contract.BlockStore)."""

    def __init__(self, pool: NDArray[np.int32]) -> None:
        self._pool = pool  # [blocks, block_size]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self._pool)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return int(self._pool[0].nbytes)

    def block(self, index: int) -> memoryview:
        """Writable bytes of one block."""
        return memoryview(self._pool[index]).cast("B")


@dataclass(frozen=True, slots=True)
class _Pass:
    """One that has begun: its plan, the block table of each chunk as it was then, the seconds that
    it takes, and the swaps that are over before it computes."""

    plan: StepPlan
    tables: tuple[list[int], ...]
    seconds: float
    swapped: tuple[int, ...]


class CostModelExecutor:
    """Runs plans in no time at all, or by `sleep`-ing (`time.sleep`) as long as the cost model
    says. `StepResult.seconds` is the model's either way, and swaps go on in that time only.

    With `capacity.depth` it is a Pipeline (engine/executor.py), of which the time is not modelled.
    Its first stage writes when a pass begins, the last one when it ends, after the tokens were
    sampled: whoever has got a block of a pass too early spoils that pass, or is spoilt by it.
    """

    def __init__(
        self,
        capacity: Capacity,
        cost: LinearCost | None = None,
        token_of: TokenOf | None = None,
        *,
        swap_seconds_per_block: float = 0.0,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        """`swap_seconds_per_block`: how long the KV of one block takes to the host, or back."""
        self._capacity = capacity
        self._cost = cost or LinearCost()
        self._token_of = token_of or checksum_token(1000)
        self._sleep = sleep
        self._pool = np.full((capacity.blocks, capacity.block_size), -1, np.int32)
        self._swaps = SimulatedSwaps(self._pool, capacity.host_blocks, swap_seconds_per_block)
        self._now = 0.0  # the seconds of all passes so far
        self.store = BlockBytes(self._pool)

    @property
    def capacity(self) -> Capacity:
        """What it pretends to run on."""
        return self._capacity

    def execute(self, plan: StepPlan) -> StepResult:
        """Write each chunk's KV, then sample from what the blocks hold. Swaps end after that,
        unless the pass waits for them."""
        return self.result(self.submit(plan))

    def submit(self, plan: StepPlan) -> _Pass:
        """Begin a pass: its swaps, and the KV of its chunks."""
        seconds, swapped = self._swap(plan)
        if plan.chunks:
            seconds += self._cost.of(plan)
        begun = _Pass(plan, tuple([[*c.sequence.blocks] for c in plan.chunks]), seconds, swapped)
        self._write(begun)
        return begun

    def ready(self, handle: _Pass) -> bool:
        """True: nothing takes time before `result`."""
        return True

    def interrupt(self) -> None:
        """Nobody waits."""

    def result(self, handle: _Pass) -> StepResult:
        """End the oldest pass that has begun."""
        chunks, seconds = handle.plan.chunks, handle.seconds
        self._now += seconds
        sampled = tuple(
            self._sample(chunk, table) if chunk.sample else None
            for chunk, table in zip(chunks, handle.tables, strict=True)
        )
        logprobs = tuple(self._prompt_logprobs(chunk) for chunk in chunks)
        if self._capacity.depth > 1:
            self._write(handle)
        if self._sleep is not None:
            self._sleep(seconds)
        swapped = handle.swapped + self._swaps.land(self._now)
        return StepResult(sampled, logprobs, seconds, swapped)

    def close(self) -> None:
        """Nothing goes on beside the passes."""

    def _swap(self, plan: StepPlan) -> tuple[float, tuple[int, ...]]:
        """Begin the swaps of a plan; the seconds that it waits for swaps before it computes, and
        those that end meanwhile."""
        until = self._swaps.begin(plan, self._now)
        if not plan.chunks and not plan.swaps_first:
            until = max(self._now, self._swaps.next_end() or self._now)
        elif not plan.swaps_first:
            return 0.0, ()
        return until - self._now, self._swaps.land(until)

    def _write(self, begun: _Pass) -> None:
        size = self._capacity.block_size
        for chunk, table in zip(begun.plan.chunks, begun.tables, strict=True):
            end = chunk.start + chunk.length
            positions = np.arange(chunk.start, end)
            blocks = np.array(table)[positions // size]
            self._pool[blocks, positions % size] = chunk.sequence.tokens[chunk.start : end]

    def _sample(self, chunk: Chunk, table: list[int]) -> Sampled:
        sequence = chunk.sequence
        end = chunk.start + chunk.length
        blocks = table[: self._capacity.blocks_for(end)]
        kv = self._pool[blocks].reshape(-1)[:end]
        token = self._token_of(sequence.request, sequence.index, kv.tobytes())
        return Sampled(token, _logprobs([token], sequence.request.logprobs)[0])

    def _prompt_logprobs(self, chunk: Chunk) -> tuple[Logprob, ...]:
        request = chunk.sequence.request
        following = request.prompt_ids[chunk.start + 1 : chunk.start + chunk.length + 1]
        return tuple(p for p in _logprobs(following, request.prompt_logprobs) if p is not None)


def _logprobs(tokens: Sequence[int], alternatives: int | None) -> list[Logprob | None]:
    """As if each token were certain; its alternatives are the tokens after it."""
    if alternatives is None:
        return [None] * len(tokens)
    tops = ([(token + i, -float(i)) for i in range(alternatives)] for token in tokens)
    return [Logprob(token, 0.0, 1, tuple(top)) for token, top in zip(tokens, tops, strict=True)]
