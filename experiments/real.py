"""A real engine for experiments: torch runs every pass of a small random Llama, and each output
ends exactly where its job says.

The model's tokens mean nothing, so the time of a pass is real and the length of an output is
forced: the sampled token becomes the end of sequence at the true length, and never before. The
scheduler sees `max_tokens`, the cap, as it does in service.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from engine.executor import Executor
from engine.load import load_executor
from experiments.drive import Drive
from experiments.engines import Setup
from experiments.pace import Pace
from experiments.records import EngineName
from scheduling.cost import CostTracker, LinearCost, StepRecord
from scheduling.decode import DecodeScheduler
from scheduling.order import Fcfs
from scheduling.plan import Capacity, Sampled, StepPlan, StepResult
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.traffic import EOS, PLAIN, Job, OpenLoop, Source

VOCABULARY = 4096


class ForcedLengths:
    """An executor whose outputs end at their jobs' true lengths.

    A pass lasts as long as its thread had a processor, at the pace of the machine at the start:
    what other processes do to it does not count. Passes that wait for swaps are timed by the wall.
    """

    def __init__(self, inner: Executor, pace: Pace) -> None:
        self._inner = inner
        self._pace = pace
        self._lengths: dict[str, int] = {}

    @property
    def capacity(self) -> Capacity:
        """That of the engine inside."""
        return self._inner.capacity

    @property
    def pace(self) -> float:
        """What a second of now is worth."""
        return self._pace.factor

    def expect(self, job: Job) -> None:
        """A job is about to be submitted."""
        self._lengths[job.id] = job.output_tokens

    def forget(self, job: Job) -> None:
        """A job has ended."""
        del self._lengths[job.id]

    def execute(self, plan: StepPlan) -> StepResult:
        """The pass, with `EOS` where an output has its true length and no other place."""
        swapped = self._pace.tick()
        started = time.thread_time()
        result = self._inner.execute(plan)
        seconds = (time.thread_time() - started) * self._pace.factor
        if plan.swaps_first or not plan.chunks:
            seconds = result.seconds
        sampled = tuple(
            None
            if token is None
            else Sampled(self._token(chunk.sequence.generated, chunk.sequence.request.id, token))
            for chunk, token in zip(plan.chunks, result.sampled, strict=True)
        )
        return StepResult(sampled, result.prompt_logprobs, seconds, swapped + result.swapped)

    def _token(self, generated: int, request_id: str, token: Sampled) -> int:
        if generated + 1 >= self._lengths[request_id]:
            return EOS
        return PLAIN if token.token_id == EOS else token.token_id


class RealEngine:
    """Torch under the scheduler of a decode worker. Its clock is the measured seconds of the
    passes and of planning them; see experiments/drive.py."""

    name: EngineName = "real"

    def __init__(self, executor: Executor) -> None:
        """Runs some hundred passes: for `step_seconds`, and for the cost model that policies
        start with."""
        self._executor = executor
        self._pace = Pace(executor)
        steps = _passes(ForcedLengths(executor, self._pace))
        full = max(step.work.sequences for step in steps)
        self._step_seconds = statistics.median(
            step.seconds
            for step in steps
            if step.work.sequences == full and not step.work.prompt_tokens
        )
        self._cost = LinearCost.fit(steps)

    @property
    def capacity(self) -> Capacity:
        """Of the engine."""
        return self._executor.capacity

    @property
    def executor(self) -> Executor:
        """What runs the passes, for those who plan them by hand."""
        return self._executor

    @property
    def cost(self) -> LinearCost:
        """As fitted at the start."""
        return self._cost

    @property
    def step_seconds(self) -> float:
        """The median of measured passes."""
        return self._step_seconds

    def serve(self, jobs: Iterable[Job] | Source, setup: Setup) -> Outcome:
        """One run."""
        tracker = CostTracker(self._cost)
        forced = ForcedLengths(self._executor, self._pace)
        scheduler = DecodeScheduler(
            setup.capacity or self._executor.capacity,
            setup.policy(tracker),
            max_waiting=1 << 30,
            rules=setup.rules,
            cost=tracker,
        )
        source = jobs if isinstance(jobs, Source) else OpenLoop(jobs)
        drive = Drive(
            scheduler,
            forced,
            source,
            rules=setup.rules,
            keep_token_times=setup.keep_token_times,
        )
        return drive.run()


def tiny_llama(
    *, layers: int = 1, hidden: int = 64, capacity: Capacity | None = None
) -> RealEngine:
    """A real engine on a random Llama that is built on the spot, single-threaded. A pass takes
    one or two milliseconds. `capacity` None: batches of 16, and KV for whatever comes."""
    wanted = capacity or Capacity(
        blocks=8192, block_size=16, max_tokens=512, max_sequences=16, max_context=1024
    )
    with TemporaryDirectory(prefix="baton-experiments-") as folder:
        _save_llama(Path(folder), layers, hidden, wanted.max_context)
        executor = load_executor(
            Path(folder),
            dtype="float32",
            block_size=wanted.block_size,
            kv_blocks=wanted.blocks,
            max_batch_tokens=wanted.max_tokens,
            max_batch_sequences=wanted.max_sequences,
            max_context=wanted.max_context,
            threads=1,
        )
    executor.warm_up()
    return RealEngine(executor)


def _save_llama(path: Path, layers: int, hidden: int, context: int) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=PLAIN,
        eos_token_id=EOS,
    )
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    Tokenizer(models.BPE()).save(str(path / "tokenizer.json"))


def _passes(executor: ForcedLengths) -> list[StepRecord]:
    """The passes of a short backlogged run of mixed prompts, first come first served."""
    steps: list[StepRecord] = []
    scheduler = DecodeScheduler(executor.capacity, Fcfs(), max_waiting=1 << 30)
    longest = min(80, executor.capacity.max_context - 64)
    for number in range(4 * executor.capacity.max_sequences):
        job = Job(f"fit{number}", 0.0, 1 + (number * 37) % longest, 20 + number % 40, 64)
        executor.expect(job)
        scheduler.submit(job.request(), 0.0)
    now = 0.0
    while (plan := scheduler.plan(now)) is not None:
        result = executor.execute(plan)
        now += result.seconds
        steps.append(StepRecord.of(plan, result.seconds))
        scheduler.apply(plan, result, now)
    return steps
