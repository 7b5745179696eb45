"""One engine on one rank, on two stages and on two shards, in turn.

    python -m benchmarks.pipelines [--sequences 8] [--prompt 64] [--tokens 32] [--repeats 5]
        [--threads 0] [--shape 160m | --model DIR]

All three run in this process with the processes of their ranks, over torch in float32, with as many
threads in all, and those whose turn it is not wait. A run submits all requests at once to an engine
loop and ends with the last token. The rate is output tokens per second, prompts included in the
time; ratios are of runs that are next to each other, and medians over the repeats. On a machine
with fewer free cores than threads they say nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.types import Output, Request, Sampling, Stopping
from engine.bench.models import SHAPES, given_or_random
from engine.executor import Executor
from engine.load import load_executor
from engine.loop import EngineLoop
from engine.model.runner import TorchExecutor
from scheduling.decode import DecodeScheduler
from scheduling.events import DecodeEvent, RequestFailed
from scheduling.order import make_policy
from scheduling.plan import StepPlan

LAYOUTS: dict[str, dict[str, Any]] = {  # the first is what the others are compared with
    "one rank": {},
    "two stages": {"pipeline_parallel": 2},
    "two shards": {"tensor_parallel": 2},
}
_FIRST_TOKEN = 100  # of the vocabulary: those before it may be special


@dataclass(frozen=True, slots=True)
class Load:
    """What a run serves."""

    sequences: int
    prompt: int  # tokens of each
    tokens: int  # of output, of each

    def requests(self, vocabulary: int, seed: int) -> list[Request]:
        """Random prompts."""
        rng = random.Random(seed)
        return [
            Request(
                f"{seed}/{number}",
                tuple(rng.randrange(_FIRST_TOKEN, vocabulary) for _ in range(self.prompt)),
                Sampling(),
                Stopping(self.tokens),
            )
            for number in range(self.sequences)
        ]


@dataclass(frozen=True, slots=True)
class Served:
    """What came of a run."""

    seconds: float
    outputs: dict[str, list[int]]

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return sum(map(len, self.outputs.values())) / self.seconds


async def serve(executor: Executor, requests: list[Request]) -> Served:
    """All of them at once, until the last token. Raises what ends the engine loop."""
    scheduler = DecodeScheduler(executor.capacity, make_policy("fcfs"), max_waiting=len(requests))
    outputs: dict[str, list[int]] = {request.id: [] for request in requests}
    left, served = set(outputs), asyncio.Event()

    def on_events(plan: StepPlan, events: list[DecodeEvent], seconds: float) -> None:
        for event in events:
            if isinstance(event, RequestFailed):
                raise RuntimeError(f"request {event.request_id} was not served")
            if isinstance(event, Output):
                outputs[event.request_id] += event.token_ids
                if event.finish is not None:
                    left.discard(event.request_id)
        if not left:
            served.set()

    loop: EngineLoop[DecodeEvent] = EngineLoop(scheduler, executor, on_events)
    loop.start()
    began = time.perf_counter()
    with loop.lock:
        for request in requests:
            scheduler.submit(request, began)
    loop.wake()
    closed = asyncio.create_task(loop.wait_closed())
    closed.add_done_callback(lambda _: served.set())
    await served.wait()
    seconds = time.perf_counter() - began
    await asyncio.gather(loop.stop(), closed)
    return Served(seconds, outputs)


def compare(
    executors: dict[str, TorchExecutor],
    load: Load,
    repeats: int,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, list[Served]]:
    """The runs of each, in turn; the first of every repeat is another one."""
    found: dict[str, list[Served]] = {name: [] for name in executors}
    names = list(executors)
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            executor = executors[name]
            requests = load.requests(executor.model.vocab_size, repeat)
            served = asyncio.run(serve(executor, requests))
            found[name].append(served)
            progress(f"{name}: {served.rate:.1f} tokens/s")
    return found


def report(found: dict[str, list[Served]]) -> list[str]:
    """Rates and ratios for people."""
    (base, expected), *others = found.items()
    lines = [f"{base}: {statistics.median(run.rate for run in expected):.1f} tokens/s"]
    for name, runs in others:
        pairs = list(zip(runs, expected, strict=True))
        ratio = statistics.median(ours.rate / theirs.rate for ours, theirs in pairs)
        same = sum(
            output == theirs.outputs[key]
            for ours, theirs in pairs
            for key, output in ours.outputs.items()
        )
        rate, count = statistics.median(run.rate for run in runs), sum(len(r.outputs) for r in runs)
        lines.append(
            f"{name}: {rate:.1f} tokens/s, {ratio:.2f} times {base}; "
            f"the same in every token: {same} of {count}"
        )
    return lines


def main() -> None:
    """Print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("sequences", 8),
        ("prompt", 64),
        ("tokens", 32),
        ("repeats", 5),
        ("threads", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shape", choices=list(SHAPES), default="160m")
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    load = Load(options.sequences, options.prompt, options.tokens)
    with given_or_random(options.model, options.shape) as (path, _), ExitStack() as stack:
        executors: dict[str, TorchExecutor] = {}
        for name, ranks in LAYOUTS.items():
            executors[name] = load_executor(
                path,
                dtype="float32",
                attention_backend="torch",
                threads=options.threads,
                block_size=16,
                kv_blocks=load.sequences * (-(-(load.prompt + load.tokens) // 16) + 1),
                max_batch_sequences=load.sequences,
                **ranks,
            )
            stack.callback(executors[name].close)
            executors[name].warm_up()
        found = compare(executors, load, options.repeats, lambda line: print(line, flush=True))
    print("\n".join(report(found)))


if __name__ == "__main__":
    main()
