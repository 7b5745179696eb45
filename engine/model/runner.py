"""Runs plans with torch: batch, forward pass, sampling.

Knows nothing about who is scheduled or why, and nothing about text.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from baton.shared_cores import SharedCores
from baton.types import Logprob, Request, Sampling, Stopping
from engine.attention.contract import Batch
from engine.model import sampler
from engine.model.batch import BatchBuilder, ChunkRows, begun_blocks
from engine.model.model import Output, PagedModel
from engine.model.pool import KvPool
from engine.model.swap import Swapper
from scheduling.plan import Capacity, Chunk, Sampled, StepPlan, StepResult
from scheduling.sequence import Sequence

if TYPE_CHECKING:
    from engine.staged import StagedBlocks

Outcome = tuple[tuple[Sampled | None, ...], tuple[tuple[Logprob, ...], ...]]
"""What was sampled, and the prompt logprobs, for each chunk of a pass."""


@dataclass(frozen=True, slots=True)
class Threads:
    """How many threads torch may use in a pass; torch keeps that number per calling thread."""

    count: int  # 0: torch's own choice

    def apply(self) -> None:
        """Set it for the calling thread."""
        if self.count:
            torch.set_num_threads(self.count)


@runtime_checkable
class ThreadsVary(Protocol):
    """A model whose number of threads can change from one pass to the next."""

    def use_threads(self, count: int) -> None:
        """Let so many of its threads compute from now on."""
        ...


class TorchExecutor:
    """An Executor (engine/executor.py) over one model and one pool."""

    def __init__(
        self,
        model: PagedModel,
        pool: KvPool,
        capacity: Capacity,
        threads: Threads,
        *,
        weight_dtype: str = "",
        choice: sampler.Choice = sampler.choose,
        swap_bandwidth: float = 0.0,
        swapper: Swapper | None = None,
    ) -> None:
        """`choice` takes tokens from the model's logits. `swap_bandwidth`: most bytes per second
        each way, 0 for no limit; `swapper`: who swaps, if not this process alone. Raises
        ConfigError where swapping is asked for and cannot be."""
        self.model = model
        self.pool = pool
        self.weight_dtype = weight_dtype  # for people; that of the KV is in the pool's geometry
        self._choice = choice
        self._swapper = swapper or Swapper.of(pool, capacity.host_blocks, bandwidth=swap_bandwidth)
        self._capacity = capacity
        self._threads = threads
        self._thread: int | None = None
        self._cores: SharedCores | None = None
        self._device = pool.storage.device
        self.batches = BatchBuilder(pool.block_size, pool.storage.device)

    @property
    def capacity(self) -> Capacity:
        """What it runs on; fixed after load."""
        return self._capacity

    @property
    def staging(self) -> StagedBlocks | None:
        """Host memory that is `pool` as the hand-off sees it, beside those pools in which the model
        computes; None if it computes in `pool`."""
        return None

    @property
    def fingerprint(self) -> str:
        """Identifies the model's configuration and weights."""
        return self.pool.geometry.model_fingerprint

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one pass, beside its swaps or after them, or wait until a swap is complete.
        Blocking, one at a time, but on any thread. Waiting for cores is not in its seconds."""
        self._take_cores()
        try:
            return self._execute(plan)
        finally:
            if self._cores is not None:
                self._cores.give_back()

    def _execute(self, plan: StepPlan) -> StepResult:
        started = time.perf_counter()
        self._use_threads()
        self._swap(plan)
        sampled, prompt = self._run(plan) if plan.chunks else ((), ())
        return StepResult(
            sampled, prompt, time.perf_counter() - started, swapped=self._swapper.collect()
        )

    def share_cores(self, cores: SharedCores) -> None:
        """Compute on the cores that each pass gets from `cores`, or on the worker's own if the
        model, which was loaded with threads for all, cannot change them. To be called before
        anything is served."""
        if isinstance(self.model, ThreadsVary):
            self._cores = cores
        else:
            self._threads, self._thread = Threads(cores.own), None

    def rest(self) -> None:
        """There is nothing to run now: let others have the cores."""
        if self._cores is not None:
            self._cores.rest()

    def close(self) -> None:
        """End the threads that swap. Idempotent."""
        self._swapper.close()
        if self._cores is not None:
            self._cores.close()

    def _use_threads(self) -> None:
        if self._thread != threading.get_ident():
            self._threads.apply()
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            self._thread = threading.get_ident()

    def _swap(self, plan: StepPlan) -> None:
        """Begin the plan's swaps, and wait for what it wants to wait for."""
        self._begin_swaps(plan)
        if not plan.chunks and not plan.swaps_first:
            self._swapper.wait_for_any()

    def _begin_swaps(self, plan: StepPlan) -> None:
        """Begin the plan's swaps, and wait for those that must be over before it computes."""
        self._swapper.swap_out(plan.swap_out)
        if plan.swaps_first:
            self._swapper.wait_for(plan.swap_out)
        self._swapper.swap_in(plan.swap_in)
        if plan.swaps_first:
            self._swapper.wait_for(plan.swap_in)

    def _take_cores(self) -> None:
        if self._cores is not None:
            assert isinstance(self.model, ThreadsVary)
            self.model.use_threads(self._cores.take())

    def _run(self, plan: StepPlan) -> Outcome:
        """The forward pass."""
        with torch.inference_mode():
            batch, rows = self._build(plan)
            return self._outcome(plan, rows, self.model.forward(batch, self.pool))

    def _build(self, plan: StepPlan) -> tuple[Batch, tuple[ChunkRows, ...]]:
        """The batch of a plan, whose new blocks are clear."""
        self._clear(begun_blocks(plan, self.pool.block_size))
        return self.batches.build(plan)

    def _outcome(self, plan: StepPlan, rows: tuple[ChunkRows, ...], output: Output) -> Outcome:
        sampled = _sample(plan.chunks, rows, output, self._choice)
        prompt = tuple(
            prompt_logprobs_of(chunk, wanted, output.logits, self._choice)
            for chunk, wanted in zip(plan.chunks, rows, strict=True)
        )
        return sampled, prompt

    def warm_up(self) -> None:
        """Run a prompt-shaped and a generation-shaped pass, so that the first request does not
        pay for what torch does once. Uses the first blocks and zeroes them: call it before
        anything is served."""
        size, capacity = self.pool.block_size, self._capacity
        tokens = min(capacity.max_tokens, capacity.max_context, self.pool.blocks * size)
        prompt = _scratch(0, tokens, list(range(capacity.blocks_for(tokens))))
        self.execute(StepPlan((Chunk(prompt, 0, tokens, sample=True),)))
        count = min(capacity.max_sequences, capacity.max_tokens, self.pool.blocks)
        singles = [_scratch(index, 1, [index]) for index in range(count)]
        self.execute(StepPlan(tuple(Chunk(single, 0, 1, sample=True) for single in singles)))
        self._clear(range(max(len(prompt.blocks), count)))

    def _clear(self, blocks: Items[int]) -> None:
        """Zero these blocks."""
        self.pool.clear(blocks)


def _sample(
    chunks: tuple[Chunk, ...],
    rows: tuple[ChunkRows, ...],
    output: Output,
    choice: sampler.Choice,
) -> tuple[Sampled | None, ...]:
    """The next token of every chunk that samples."""
    pairs = list(zip(chunks, rows, strict=True))
    greedy = [chunk.sequence for chunk, row in pairs if row.best is not None]
    others = [chunk.sequence for chunk, row in pairs if row.sample is not None]
    best = iter(sampler.pick(output.best, greedy))
    drawn = iter(_draw(rows, others, output.logits, choice))
    return tuple(
        None if not chunk.sample else next(best) if row.best is not None else next(drawn)
        for chunk, row in pairs
    )


def _draw(
    rows: tuple[ChunkRows, ...],
    sequences: list[Sequence],
    logits: Tensor,
    choice: sampler.Choice,
) -> list[Sampled]:
    """The next token of the sequences that need all of their logits."""
    if not sequences:
        return []
    if len(sequences) < len(logits):  # the others are for prompt logprobs
        wanted = [row.sample for row in rows if row.sample is not None]
        logits = logits[torch.tensor(wanted, device=logits.device)]
    return sampler.sample(logits, sequences, choice)


def prompt_logprobs_of(
    chunk: Chunk, rows: ChunkRows, logits: Tensor, choice: sampler.Choice = sampler.choose
) -> tuple[Logprob, ...]:
    """Logprobs of the prompt tokens that the chunk's rows predict, if they are asked for."""
    alternatives = chunk.sequence.request.prompt_logprobs
    if alternatives is None or not rows.prompt:
        return ()
    first = chunk.start + 1
    targets = chunk.sequence.tokens[first : first + len(rows.prompt)]
    return sampler.prompt_logprobs(
        logits[rows.prompt.start : rows.prompt.stop], targets, alternatives, choice
    )


def _scratch(index: int, tokens: int, blocks: list[int]) -> Sequence:
    """A sequence that nobody asked for."""
    request = Request(f"warm-up-{index}", (0,) * tokens, Sampling(), Stopping(max_tokens=1))
    sequence = Sequence.start(request, 0, now=0.0)
    sequence.blocks = blocks
    return sequence
