"""A real engine for experiments: torch runs every pass of a small random Llama, and each output
ends exactly where its job says.

The model's tokens mean nothing, so the time of a pass is real and the length of an output is
forced: the sampled token becomes the end of sequence at the true length, and never before. The
scheduler sees `max_tokens`, the cap, as it does in service.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

from engine.executor import Executor
from engine.model.load import load_executor
from experiments.drive import Drive
from experiments.engines import Setup
from experiments.records import EngineName
from scheduling.cost import CostTracker, LinearCost, StepRecord
from scheduling.decode import DecodeScheduler
from scheduling.order import Fcfs
from scheduling.plan import Capacity, Sampled, StepPlan, StepResult
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.traffic import EOS, PLAIN, Job, OpenLoop, Source

VOCABULARY = 4096


class ForcedLengths:
    """An executor whose outputs end at their jobs' true lengths."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self._lengths: dict[str, int] = {}

    @property
    def capacity(self) -> Capacity:
        """That of the engine inside."""
        return self._inner.capacity

    def expect(self, job: Job) -> None:
        """A job is about to be submitted."""
        self._lengths[job.id] = job.output_tokens

    def forget(self, job: Job) -> None:
        """A job has ended."""
        del self._lengths[job.id]

    def execute(self, plan: StepPlan) -> StepResult:
        """The pass, with `EOS` where an output has its true length and no other place."""
        result = self._inner.execute(plan)
        sampled = tuple(
            None
            if token is None
            else Sampled(self._token(chunk.sequence.generated, chunk.sequence.request.id, token))
            for chunk, token in zip(plan.chunks, result.sampled, strict=True)
        )
        return StepResult(sampled, result.prompt_logprobs, result.seconds, result.swapped)

    def _token(self, generated: int, request_id: str, token: Sampled) -> int:
        if generated + 1 >= self._lengths[request_id]:
            return EOS
        return PLAIN if token.token_id == EOS else token.token_id


class RealEngine:
    """Torch under the scheduler of a decode worker. Its clock is the measured seconds of the
    passes and of planning them; see experiments/drive.py."""

    name: EngineName = "real"

    def __init__(self, executor: Executor, *, context: int = 80) -> None:
        """`context`: the usual tokens of a sequence, for `step_seconds`. Runs some hundred passes
        to fit a cost model, which policies start with."""
        self._executor = executor
        self._cost = _fit(executor, context)
        batch = executor.capacity.max_sequences
        self._step_seconds = (
            self._cost.base
            + self._cost.per_sequence * batch
            + self._cost.per_context * batch * context
        )

    @property
    def capacity(self) -> Capacity:
        """Of the engine."""
        return self._executor.capacity

    @property
    def cost(self) -> LinearCost:
        """As fitted at the start."""
        return self._cost

    @property
    def step_seconds(self) -> float:
        """By the fitted cost model."""
        return self._step_seconds

    def serve(self, jobs: Iterable[Job] | Source, setup: Setup) -> Outcome:
        """One run."""
        tracker = CostTracker(self._cost)
        forced = ForcedLengths(self._executor)
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


@contextmanager
def tiny_llama(
    *,
    layers: int = 2,
    hidden: int = 128,
    capacity: Capacity | None = None,
) -> Iterator[RealEngine]:
    """A real engine on a random Llama that is built on the spot, single-threaded; a pass takes
    about a millisecond. `capacity` None: batches of 16, and KV for whatever comes."""
    wanted = capacity or Capacity(
        blocks=8192, block_size=16, max_tokens=512, max_sequences=16, max_context=1024
    )
    threads = torch.get_num_threads()
    try:
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
        yield RealEngine(executor)
    finally:
        torch.set_num_threads(threads)


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
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    Tokenizer(models.BPE()).save(str(path / "tokenizer.json"))


def _fit(executor: Executor, context: int) -> LinearCost:
    """A cost model from a short backlogged run of mixed prompts, first come first served."""
    steps: list[StepRecord] = []
    forced = ForcedLengths(executor)
    scheduler = DecodeScheduler(executor.capacity, Fcfs(), max_waiting=1 << 30)
    batch = executor.capacity.max_sequences
    for number in range(3 * batch):
        prompt = 1 + (number * 37) % context
        job = Job(f"fit{number}", 0.0, prompt, 20 + number % 40, 64)
        forced.expect(job)
        scheduler.submit(job.request(), 0.0)
    now = 0.0
    while (plan := scheduler.plan(now)) is not None:
        result = forced.execute(plan)
        now += result.seconds
        steps.append(StepRecord.of(plan, result.seconds))
        scheduler.apply(plan, result, now)
    # A pass that another process interrupted says nothing of the engine.
    longest = 4 * sorted(step.seconds for step in steps)[len(steps) // 2]
    prompts = [s for s in steps if s.work.prompt_tokens]
    return LinearCost.fit([s for s in steps if s.seconds <= longest] or prompts)
