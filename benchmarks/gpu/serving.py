"""A list of requests through Baton's scheduler and engine, and through transformers' continuous
batching: output tokens per second, on the same GPU, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from baton.types import Request, Sampling, Stopping
from benchmarks.gpu import peer
from benchmarks.gpu.models import SHAPES, Sizes, executor, give_back
from benchmarks.gpu.work import Job, jobs
from engine.gpu.executor import GpuExecutor
from scheduling.decode import DecodeScheduler
from scheduling.order import make_policy
from scheduling.rules import Rules


@dataclass(frozen=True, slots=True)
class Load:
    """What is served. All requests come at once; none ends before its output is full."""

    requests: int = 256
    prompt: int = 256  # tokens, half of this to one and a half times
    output: int = 128
    max_tokens: int = 2048  # of a pass

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.requests} x ({self.prompt} + {self.output})"


@dataclass(frozen=True, slots=True)
class Compared:
    """Output tokens per second of each round, one after the other."""

    baton: list[float]
    transformers: list[float]
    setting: str  # of transformers

    @property
    def ratio(self) -> float:
        """Median over rounds of Baton's rate by transformers'."""
        pairs = zip(self.baton, self.transformers, strict=True)
        return statistics.median(ours / theirs for ours, theirs in pairs)


def compare(
    shape: str,
    load: Load,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    say: Callable[[str], None],
) -> Compared:
    """Both in turn, greedily, over the same prompts and output lengths; in a round before the
    first both warm up."""
    work = jobs(load.requests, SHAPES[shape]().vocab_size, prompt=load.prompt, output=load.output)
    blocks = sum(-(-(len(job.prompt) + job.output + 1) // 16) + 1 for job in work)
    ours = executor(shape, device, Sizes(blocks, load.max_tokens, len(work)), dtype=dtype)
    theirs = peer.Transformers(shape, device, dtype)
    try:
        setting = theirs.start_best(peer.available(device), work, say)
        found = Compared([], [], setting.name)
        for turn in range(rounds + 1):
            pair = baton(ours, work), theirs.run(work)
            if turn:
                found.baton.append(pair[0])
                found.transformers.append(pair[1])
    finally:
        theirs.stop()
        ours.close()
        del ours, theirs
        give_back(device)
    return found


def baton(executor: GpuExecutor, work: list[Job]) -> float:
    """Output tokens per second: every request at once, until the last has ended."""
    scheduler = DecodeScheduler(
        executor.capacity, make_policy("fcfs"), max_waiting=len(work), rules=Rules(ahead=True)
    )
    begun = time.perf_counter()
    for index, job in enumerate(work):
        stopping = Stopping(max_tokens=job.output)
        scheduler.submit(Request(f"{index}", job.prompt, Sampling(), stopping), 0.0)
    made = 0
    while (plan := scheduler.plan(time.perf_counter() - begun)) is not None:
        result = executor.execute(plan)
        made += sum(token is not None for token in result.sampled)
        scheduler.apply(plan, result, time.perf_counter() - begun)
    took = time.perf_counter() - begun
    if made != sum(job.output for job in work):
        raise RuntimeError(f"{made} tokens were made, and others asked for")
    return made / took
