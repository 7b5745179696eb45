"""The least time that a workload can take on this machine, whoever serves it.

The passes are those that Baton's scheduler makes under the same token budget. Each takes as long as
the slower of two: reading what it must read at the measured bandwidth, computing what it must
compute at the measured peak (engine/bench/work.py counts both). KV is in bfloat16.
"""

from __future__ import annotations

from pathlib import Path

from baton.types import Output as NewTokens
from baton.types import Request, Sampling, Stopping
from benchmarks.peers import rounds
from benchmarks.peers.process import Output
from benchmarks.peers.workloads import Workload
from engine.bench.work import ModelCount, Part
from engine.ceilings import Ceilings
from scheduling.decode import DecodeScheduler
from scheduling.order import Fcfs
from scheduling.plan import Capacity, Sampled, StepPlan, StepResult

_WEIGHTS = {"bf16": "bfloat16", "int8": "int8"}
_BLOCK_SIZE = 16


def count(model: Path, precision: str) -> ModelCount:
    """What passes of a model cost. Raises ModelError if it is not of the Llama family."""
    return ModelCount.at(model, _WEIGHTS[precision], "bfloat16")


def measures(
    workload: Workload,
    model: ModelCount,
    ceilings: Ceilings,
    *,
    max_tokens: int,
    max_sequences: int,
) -> dict[str, float]:
    """The metrics of a system as fast as the machine; as rounds.measures has them."""
    scheduler = _scheduler(workload, max_tokens, max_sequences)
    found = {number: Output((), 0.0, 0.0) for number in range(len(workload.asks))}
    now, left = 0.0, len(workload.asks)
    while left:
        plan = scheduler.plan(now)
        assert plan is not None, "requests are left and nothing can run"
        work = model.work(Part(c.start, c.length, int(c.sample)) for c in plan.chunks)
        seconds = ceilings.floor(
            read_bytes=work.bytes, operations=work.operations, precision=model.precision
        )
        now += seconds
        for event in scheduler.apply(plan, _result(plan, seconds), now):
            if isinstance(event, NewTokens):
                number = int(event.request_id)
                output = found[number]
                tokens = output.tokens + event.token_ids
                found[number] = Output(tokens, output.first or now, now)
                left -= event.finish is not None
    return rounds.measures(list(found.values()))


def _scheduler(workload: Workload, max_tokens: int, max_sequences: int) -> DecodeScheduler:
    """One with all requests in it, and room for all their KV."""
    longest = workload.longest
    capacity = Capacity(
        blocks=max_sequences * -(-longest // _BLOCK_SIZE),
        block_size=_BLOCK_SIZE,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        max_context=longest,
    )
    scheduler = DecodeScheduler(capacity, Fcfs(), max_waiting=len(workload.asks))
    for number, ask in enumerate(workload.asks):
        stopping = Stopping(max_tokens=ask.output)
        scheduler.submit(Request(str(number), ask.prompt, Sampling(), stopping), float(number))
    return scheduler


def _result(plan: StepPlan, seconds: float) -> StepResult:
    sampled = tuple(Sampled(0) if chunk.sample else None for chunk in plan.chunks)
    return StepResult(sampled, tuple(() for _ in plan.chunks), seconds)
