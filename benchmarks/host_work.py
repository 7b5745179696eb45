"""The host's work between two steps of a decode worker: scheduling, batch, sampling, messages.

    python -m benchmarks.host_work [--batch 32] [--model DIR | --shape 135m] [--out DIR]

A decode worker's own parts (DecodeScheduler, executor, worker, gRPC service) in this process, with
a client in another one that takes the tokens as a gateway does. Clocks around each verb, no
profiler: what stands between the end of one forward pass and the beginning of the next is the
host's. Accounts, messages and metrics are the event loop's work while the next pass runs; the
processor time that this takes is told apart.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from prometheus_client import CollectorRegistry
from rich.console import Console

from baton import cores, rpc
from baton.internal.v1 import worker_pb2_grpc
from decode_worker.metrics import DecodeMetrics
from decode_worker.service import DecodeService
from decode_worker.worker import DecodeWorker
from engine.bench.backends import backend_of, load, weights_of
from engine.bench.models import SHAPES, given_or_random
from engine.bench.records import Record, Setup, plain, save
from engine.bench.tables import Table
from engine.loop import EngineLoop
from engine.model import runner
from kv_transfer.consumer import PullConsumer
from kv_transfer.contract import KvLayout
from kv_transfer.memory import Network
from scheduling.cost import CostTracker
from scheduling.decode import DecodeScheduler
from scheduling.events import DecodeEvent
from scheduling.order import make_policy
from scheduling.plan import StepPlan

PARTS = {  # in the order of a step
    "plan": "plan: who runs",
    "batch": "build the batch",
    "model": "model: the forward pass",
    "sampling": "sample",
    "execute": "rest of the executor",
    "apply": "apply: what it means",
    "between": "between the verbs",
}
BESIDE = "sending, beside the pass (processor time)"
POLICY = "predicted-srpt"


@dataclass
class Clocks:
    """Seconds of each part, step by step. Steps follow each other; a step begins with `plan`.

    Parts that run inside `execute` are taken out of it.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    _now: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _begun: float = 0.0
    _event_loop: float = 0.0  # processor time of its thread when it was last told of a pass
    _plan: StepPlan | None = None
    _wrapped: list[tuple[object, str, Any]] = field(default_factory=list)

    def wrap(self, owner: object, name: str, part: str) -> None:
        """Let the clock run while `owner.name` does."""
        inner = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*given, **named)
            finally:
                self._now[part] += time.perf_counter() - started

        setattr(owner, name, timed)
        self._wrapped.append((owner, name, inner))

    def unwrap(self) -> None:
        """Take the clocks away from all that `wrap` was given."""
        while self._wrapped:
            setattr(*self._wrapped.pop())

    def wrap_plan(self, scheduler: DecodeScheduler, batch: int) -> None:
        """As `wrap`, for the verb that a step begins with. Steps are kept if they generate one
        token for each of `batch` sequences."""
        inner = scheduler.plan

        def timed(now: float) -> StepPlan | None:
            started = time.perf_counter()
            if self._plan is not None and self._is_full(self._plan, batch):
                self._keep(started - self._begun)
            self._now.clear()
            self._begun = started
            self._plan = inner(now)
            self._now["plan"] = time.perf_counter() - started
            return self._plan

        scheduler.plan = timed  # type: ignore[method-assign]

    def wrap_events(self, engine: EngineLoop[DecodeEvent]) -> None:
        """See what its event loop does from one pass that it is told of to the next."""
        inner = engine._on_events

        def told(plan: StepPlan, events: list[DecodeEvent], seconds: float) -> None:
            before, self._event_loop = self._event_loop, time.thread_time()
            self._now["beside"] = self._event_loop - before
            inner(plan, events, seconds)

        engine._on_events = told
        self._wrapped.append((engine, "_on_events", inner))

    @staticmethod
    def _is_full(plan: StepPlan, batch: int) -> bool:
        return len(plan.chunks) == batch and all(chunk.length == 1 for chunk in plan.chunks)

    def _keep(self, seconds: float) -> None:
        step = dict(self._now)
        inside = sum(step.get(part, 0.0) for part in ("batch", "model", "sampling"))
        step["between"] = seconds - step["plan"] - step["apply"] - step["execute"]
        step["execute"] -= inside
        step["step"] = seconds
        self.steps.append(step)

    def summary(self) -> dict[str, float]:
        """Medians of each part, of the whole `step` and of `host`, the step without the model;
        with `fast_` before the name, what one step in ten stays within: others on the machine have
        disturbed it less."""
        if len(self.steps) < 2:
            raise RuntimeError("too few steps had the whole batch in them")
        for step in self.steps:
            step["host"] = step["step"] - step["model"]
        found = {}
        for name in (*PARTS, "beside", "host", "step"):
            values = [step.get(name, 0.0) for step in self.steps]
            found[name] = statistics.median(values)
            found[f"fast_{name}"] = statistics.quantiles(values, n=10, method="inclusive")[0]
        return found


@click.command()
@click.option("--batch", default=32, show_default=True, help="sequences")
@click.option("--prompt", default=128, show_default=True, help="tokens of each prompt")
@click.option("--tokens", default=200, show_default=True, help="output tokens of each sequence")
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy")
@click.option("--threads", default=0, help="threads of the model; all cores if 0")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--backend", default="auto", show_default=True, help="auto or torch")
@click.option("--shape", default="135m", show_default=True, type=click.Choice(list(SHAPES)))
@click.option("--model", type=click.Path(path_type=Path), help="a model directory instead")
@click.option("--out", type=click.Path(path_type=Path), help="folder for host-work.json")
def main(**options: Any) -> None:
    """Time the parts of a decode worker's step."""
    with given_or_random(options["model"], options["shape"]) as (path, name):
        records = asyncio.run(measure(path, name, options))
    Console(width=110).print(table(records).rich())
    if options["out"] is not None:
        options["out"].mkdir(parents=True, exist_ok=True)
        save(options["out"] / "host-work.json", records)


async def measure(path: Path, name: str, options: dict[str, Any]) -> list[Record]:
    """Serve the client once, and say where the time went."""
    batch, length = options["batch"], options["prompt"] + options["tokens"]
    executor = load(
        path,
        options["backend"],
        dtype=options["dtype"],
        threads=options["threads"],
        kv_blocks=batch * (-(-length // 16) + 1),
        max_batch_sequences=batch,
    )
    executor.warm_up()
    cost = CostTracker()
    policy = make_policy(POLICY, cost=cost)
    scheduler = DecodeScheduler(executor.capacity, policy, max_waiting=batch, cost=cost)
    layout = KvLayout(**asdict(executor.pool.geometry))
    worker = DecodeWorker(
        executor,
        scheduler,
        PullConsumer(executor.pool, layout, Network().dialer(layout.digest), timeout=1.0),
        DecodeMetrics(executor.pool.block_bytes, CollectorRegistry()),
        reserve_timeout=60.0,
    )
    clocks = Clocks()
    instrument(clocks, worker, scheduler, executor, batch)
    try:
        await serve(worker, options)
    finally:
        clocks.unwrap()
        executor.close()
    values = clocks.summary() | {"steps": len(clocks.steps)}
    weights, threads = weights_of(executor, options["dtype"]), options["threads"]
    setup = Setup("baton", backend_of(executor), name, weights, threads or cores.available())
    place = {"tokens": batch, "batch": batch, "context": length}
    return plain(setup, "host-work", values, **place)


def instrument(
    clocks: Clocks,
    worker: DecodeWorker,
    scheduler: DecodeScheduler,
    executor: runner.TorchExecutor,
    batch: int,
) -> None:
    """Put the clocks around the verbs."""
    clocks.wrap_plan(scheduler, batch)
    clocks.wrap(scheduler, "apply", "apply")
    clocks.wrap_events(worker.engine)
    clocks.wrap(executor, "execute", "execute")
    clocks.wrap(executor.model, "forward", "model")
    clocks.wrap(executor.batches, "build", "batch")
    clocks.wrap(runner, "_sample", "sampling")


async def serve(worker: DecodeWorker, options: dict[str, Any]) -> None:
    """Run the worker behind its gRPC service until the client has had its tokens."""
    server = rpc.Server("127.0.0.1:0")
    worker_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeService(worker), server.grpc)
    await server.start(("baton.internal.v1.DecodeService",))
    worker.engine.start()
    script = Path(__file__).with_name("decode_client.py")
    sizes = [str(options[name]) for name in ("batch", "prompt", "tokens", "temperature")]
    client = await asyncio.create_subprocess_exec(sys.executable, script, server.address, *sizes)
    code = await client.wait()
    await worker.stop()
    await server.stop(0)
    if code:
        raise RuntimeError(f"the client failed with exit code {code}")


def table(records: list[Record]) -> Table:
    """The parts of a step, with their shares of it; a column for each setup."""
    columns: dict[Setup, dict[str, float]] = {}
    for record in records:
        columns.setdefault(record.setup, {})[record.metric] = record.value
    ends = [("host", "all but the model"), ("step", "the step"), ("beside", BESIDE)]
    rows = [*PARTS.items(), *ends]
    header = [""]
    for setup in columns:
        header += [f"{setup.backend}, {setup.threads} threads: ms", "of the step"]
        header += ["a fast step: ms", "of the step"]
    body = []
    for name, label in rows:
        if not any(name in values for values in columns.values()):
            continue
        cells = [label]
        for values in columns.values():
            for kind in ("", "fast_"):
                seconds, step = values.get(kind + name), values[f"{kind}step"]
                told = seconds is not None
                cells += [f"{seconds * 1e3:.2f}", f"{seconds / step:.1%}"] if told else ["", ""]
        body.append(tuple(cells))
    batch = records[0].batch if records else 0
    model = records[0].model if records else ""
    return Table(f"A step of {batch} sequences, {model}", tuple(header), body, names=1)


if __name__ == "__main__":
    main()
