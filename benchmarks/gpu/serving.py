"""A list of requests through Baton's scheduler and engine, and through transformers' continuous
batching: output tokens per second, on the same GPU, in turn."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from baton.types import Request, Sampling, Stopping
from benchmarks.gpu.models import SHAPES
from engine.gpu.executor import GpuExecutor
from scheduling.decode import DecodeScheduler
from scheduling.order import make_policy
from scheduling.rules import Rules


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt and how many tokens follow it."""

    prompt: tuple[int, ...]
    output: int


def jobs(count: int, vocabulary: int, *, prompt: int, output: int, seed: int = 0) -> list[Job]:
    """Prompts and outputs of half to one and a half times these lengths."""
    chooser = random.Random(seed)

    def near(length: int) -> int:
        return chooser.randrange(max(1, length // 2), length * 3 // 2 + 1)

    return [
        Job(tuple(chooser.randrange(3, vocabulary) for _ in range(near(prompt))), near(output))
        for _ in range(count)
    ]


def baton(executor: GpuExecutor, work: list[Job]) -> float:
    """Output tokens per second: every request at once, until the last has ended."""
    scheduler = DecodeScheduler(
        executor.capacity, make_policy("fcfs"), max_waiting=len(work), rules=Rules(ahead=True)
    )
    for index, job in enumerate(work):
        stopping = Stopping(max_tokens=job.output)
        scheduler.submit(Request(f"{index}", job.prompt, Sampling(), stopping), 0.0)
    begun = time.perf_counter()
    while (plan := scheduler.plan(time.perf_counter() - begun)) is not None:
        result = executor.execute(plan)
        scheduler.apply(plan, result, time.perf_counter() - begun)
    return sum(job.output for job in work) / (time.perf_counter() - begun)


class Transformers:
    """The same shape in transformers, with random weights of its own."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype) -> None:
        with device:
            self._model: Any = AutoModelForCausalLM.from_config(
                SHAPES[shape](), dtype=dtype, attn_implementation="sdpa"
            ).eval()

    def run(self, work: list[Job]) -> float:
        """Output tokens per second. Requests of one output length go in one call: the interface
        takes one configuration for all, so each length is a call of its own."""
        config = GenerationConfig(
            max_new_tokens=statistics.mode(job.output for job in work),
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        begun = time.perf_counter()
        outputs = self._model.generate_batch(
            [list(job.prompt) for job in work], generation_config=config, progress_bar=False
        )
        took = time.perf_counter() - begun
        return sum(len(output.generated_tokens) for output in outputs.values()) / took


def equal_outputs(work: list[Job], output: int) -> list[Job]:
    """The jobs with outputs of one length, as transformers' interface has it."""
    return [Job(job.prompt, output) for job in work]
