"""Runs plans on a GPU without a gap between passes.

While the host takes a pass's tokens, tells the gateways and makes the next plan, the device already
computes the pass that will most likely be wanted: one more token for every sequence of the last
one, from tokens that the host has not seen yet. A plan takes from that guess what it finds in it,
and has the rest computed as usual; what nobody takes is forgotten. A guess writes KV only behind
the end of its sequences, into their own blocks, and before anything that comes later, so one that
was wrong harms nobody.

The plans are those of any executor, and so are the results.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from baton.types import Logprob, Request, Sampling, Stopping
from engine.gpu.launcher import Launched, Launcher
from engine.gpu.model import GpuLlama
from engine.gpu.sampler import Drawn
from engine.gpu.transfer import Stopwatch
from engine.model.batch import BatchBuilder
from engine.model.pool import KvPool
from engine.model.runner import Threads, TorchExecutor
from engine.model.swap import Swapper
from scheduling.plan import Capacity, Chunk, Sampled, StepPlan, StepResult
from scheduling.sequence import Sequence

# A guess that leaves out more of the sequences than this is not worth a pass of its own.
_WORTH = 0.75


@dataclass(frozen=True, slots=True)
class Guess:
    """A pass that runs ahead of its plan: `rows[sequence]` is the row of a sequence's next token,
    whose KV goes where its block table said when the pass began."""

    launched: Launched
    watch: Stopwatch
    rows: dict[Sequence, int]
    tables: list[list[int]]
    positions: list[int]
    expected: list[int]  # the tokens that it was computed from; known when their pass is over

    def row_of(self, chunk: Chunk) -> int | None:
        """Where the chunk's result is; None if it was not foreseen, or something has changed."""
        row = self.rows.get(chunk.sequence)
        if row is None or chunk.length != 1 or not chunk.sample:
            return None
        table, position = self.tables[row], self.positions[row]
        sequence = chunk.sequence
        same = (
            chunk.start == position
            and sequence.blocks[: len(table)] == table
            and sequence.tokens[position] == self.expected[row]
        )
        return row if same else None


class GpuExecutor(TorchExecutor):
    """An Executor (engine/executor.py) over one model and one pool on a GPU."""

    def __init__(
        self,
        model: GpuLlama,
        pool: KvPool,
        capacity: Capacity,
        *,
        weight_dtype: str = "",
        swap_bandwidth: float = 0.0,
        swapper: Swapper | None = None,
        launcher: Callable[[BatchBuilder], Launcher] | None = None,
        ahead: bool = True,
    ) -> None:
        """`ahead`: compute what is likely before it is asked for; not for a prefill worker, whose
        sequences do not go on. `swap_bandwidth` and `swapper` as in TorchExecutor; `launcher` makes
        what runs the passes, if they are not over `pool`."""
        super().__init__(
            model,
            pool,
            capacity,
            Threads(0),
            weight_dtype=weight_dtype,
            swap_bandwidth=swap_bandwidth,
            swapper=swapper,
        )
        self.taken = 0  # results that a guess had ready
        self.wasted = 0  # results of guesses that nobody wanted
        self.batches = BatchBuilder(pool.block_size)  # on the host: nothing waits for its copies
        if launcher is None:
            launcher = partial(Launcher, model, pool, capacity)
        self._launcher = launcher(self.batches)
        self._ahead = ahead
        self._guess: Guess | None = None

    def _execute(self, plan: StepPlan) -> StepResult:
        """Run one pass, or take it from the one that runs already.

        The seconds of the result are the device's where the pass was foreseen, which may have been
        long ago, else those of the call."""
        begun = time.perf_counter()
        self._use_threads()
        with torch.inference_mode():
            self._swap(plan)
            sampled, prompt, watch = self._take(plan) if plan.chunks else ((), (), None)
        seconds = watch.seconds() if watch else time.perf_counter() - begun
        return StepResult(sampled, prompt, seconds, swapped=self._swapper.collect())

    def warm_up(self) -> None:
        """What TorchExecutor does, after a pass of which all is wanted that may be; and record the
        graphs."""
        self.execute(StepPlan((Chunk(_demanding(), 0, 1, sample=True),)))
        self._guess = None
        super().warm_up()
        self._guess = None
        self._launcher.record()

    def close(self) -> None:
        """End the threads that swap. Idempotent."""
        self._guess = None
        super().close()

    def _take(
        self, plan: StepPlan
    ) -> tuple[tuple[Sampled | None, ...], tuple[tuple[Logprob, ...], ...], Stopwatch | None]:
        """What was sampled and the prompt logprobs, for each chunk; and how long the device took,
        if all of it had been begun before."""
        guess, self._guess = self._guess, None
        rows = [guess.row_of(chunk) if guess else None for chunk in plan.chunks]
        missing = [chunk for chunk, row in zip(plan.chunks, rows, strict=True) if row is None]
        launched = self._launcher.chunks(missing) if missing else None
        passes = [each.drawn for each in (guess and guess.launched, launched) if each]
        following = self._go_on(plan, rows, passes)
        foreseen = guess.launched.drawn.sampled() if guess and len(missing) < len(rows) else []
        computed = iter(launched.results() if launched else ())
        sampled: list[Sampled | None] = []
        prompt: list[tuple[Logprob, ...]] = []
        for row in rows:
            token, logprobs = next(computed) if row is None else (foreseen[row], ())
            sampled.append(token)
            prompt.append(logprobs)
        if guess is not None:
            hits = len(rows) - len(missing)
            self.taken, self.wasted = self.taken + hits, self.wasted + len(guess.rows) - hits
        if following is not None and all(drawn.goes_on for drawn in passes):
            chunks = zip(plan.chunks, sampled, strict=True)
            tokens = {chunk.sequence: token for chunk, token in chunks}
            found = (tokens[sequence] for sequence in following.rows)
            following.expected.extend(token.token_id if token else -1 for token in found)
            self._guess = following
        return tuple(sampled), tuple(prompt), guess.watch if guess and not missing else None

    def _go_on(self, plan: StepPlan, rows: list[int | None], passes: list[Drawn]) -> Guess | None:
        """Begin the pass that most likely follows: one more token for each sequence that goes on,
        behind those of `passes`: the guess, with the tokens of `rows`, and what was missing in it.

        Not while a prompt is under way, whose next chunk belongs into the same pass.
        """
        if not self._ahead or not all(chunk.sample for chunk in plan.chunks):
            return None
        size = self.pool.block_size
        sources: list[int] = []  # rows of the tokens of both passes, one after the other
        sequences: list[Sequence] = []
        fresh = sum(len(drawn.tokens) for drawn in passes) - rows.count(None)
        wanted = 0
        for chunk, row in zip(plan.chunks, rows, strict=True):
            source, fresh = (fresh, fresh + 1) if row is None else (row, fresh)
            sequence = chunk.sequence
            if not self._lasts(sequence):
                continue
            wanted += 1
            if len(sequence.tokens) < len(sequence.blocks) * size:
                sequences.append(sequence)
                sources.append(source)
        few = len(sequences) < _WORTH * wanted
        if not sequences or few or not self._launcher.goes_on(len(sequences)):
            return None
        tokens = torch.cat([drawn.tokens for drawn in passes])
        positions = [len(sequence.tokens) for sequence in sequences]
        begun, watch = self._launcher.go_on(sequences, positions, tokens, sources)
        tables = [s.blocks[: p // size + 1] for s, p in zip(sequences, positions, strict=True)]
        order = {sequence: row for row, sequence in enumerate(sequences)}
        return Guess(begun, watch, order, tables, positions, [])

    def _lasts(self, sequence: Sequence) -> bool:
        """Whether another token can follow the one that is being computed."""
        left = sequence.request.stopping.max_tokens - sequence.generated
        return left > 1 and len(sequence.tokens) < self._capacity.max_context


def _demanding() -> Sequence:
    """A sequence that nobody asked for, whose token needs every kernel that tokens may need."""
    sampling = Sampling(
        temperature=1.0, top_k=1, top_p=0.5, repetition_penalty=2.0, logit_bias=((0, 1.0),)
    )
    stopping = Stopping(max_tokens=2, min_tokens=2, eos_token_ids=frozenset({0}))
    request = Request("warm-up", (0,), sampling, stopping, logprobs=1)
    sequence = Sequence.start(request, 0, now=0.0)
    sequence.blocks = [0]
    return sequence
