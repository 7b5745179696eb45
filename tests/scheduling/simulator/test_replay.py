"""A recorded run, of a real engine too, gives the same plans again."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

import demo_model
from baton.config import DecodeConfig
from baton.prefix import block_keys
from baton.types import LengthEstimate, Request, Sampling, Stopping
from engine.executor import Executor
from engine.load import load_executor
from engine.recording import RecordedDecodeScheduler, recorder_from
from engine.simulated import CostModelExecutor
from scheduling.cost import CostTracker, LinearCost
from scheduling.decode import DecodeScheduler
from scheduling.order import policy_from
from scheduling.plan import Capacity
from scheduling.rules import Rules
from scheduling.simulator.replay import Replay, replay

Clock = Callable[[float], float]
"""(seconds that the last pass took) to the time now."""


def _record(
    path: Path, executor: Executor, requests: list[Request], clock: Clock, **settings: Any
) -> RecordedDecodeScheduler:
    """Serve `requests`, a few more with every pass; abort each ninth on its way."""
    config = DecodeConfig(record_run=path, **settings)
    cost = CostTracker()
    recorder = recorder_from(config, "decode", executor.capacity, cost.model)
    assert recorder is not None
    scheduler = RecordedDecodeScheduler(
        executor.capacity,
        policy_from(config, cost),
        recorder,
        max_waiting=config.max_waiting,
        rules=Rules.of(config),
        cost=cost,
        block_keys=block_keys,
    )
    with contextlib.closing(recorder):
        _serve(scheduler, executor, requests, clock)
    return scheduler


def _serve(
    scheduler: DecodeScheduler, executor: Executor, requests: list[Request], clock: Clock
) -> None:
    now, waiting = clock(0.0), list(requests)
    while True:
        for request in waiting[:2]:
            scheduler.submit(request, now)
        if len(waiting) % 9 == 1:
            scheduler.abort(waiting[0].id, now)
        waiting = waiting[2:]
        plan = scheduler.plan(now)
        if plan is None:
            if not waiting:
                break
            continue
        result = executor.execute(plan)
        now = clock(result.seconds)
        scheduler.apply(plan, result, now)
        scheduler.check_integrity()


def _requests(count: int, *, vocabulary: int, longest: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            f"r{number}",
            tuple(rng.randrange(5, vocabulary) for _ in range(rng.randrange(1, longest))),
            Sampling(n=1 + (number % 7 == 0)),
            Stopping(rng.randrange(2, longest), eos_token_ids=frozenset({3})),
            priority=number % 3 == 0,
            tenant="ab"[number % 5 == 0],
            estimate=LengthEstimate(rng.randrange(1, longest), longest) if number % 2 else None,
        )
        for number in range(count)
    ]


def _virtual() -> Clock:
    now = 0.0

    def clock(seconds: float) -> float:
        nonlocal now
        now += seconds
        return now

    return clock


@pytest.mark.parametrize("policy", ["fcfs", "mlfq", "skip-join-mlfq", "predicted-srpt"])
@pytest.mark.parametrize("preemption", ["recompute", "swap", "auto"])
def test_a_run_on_the_cost_model_is_replayed_plan_by_plan(
    tmp_path: Path, policy: str, preemption: Literal["recompute", "swap", "auto"]
) -> None:
    capacity = Capacity(24, 4, max_tokens=16, max_sequences=5, max_context=64, host_blocks=40)
    executor = CostModelExecutor(capacity, LinearCost(0.01, 0.001), swap_seconds_per_block=0.002)
    requests = _requests(40, vocabulary=100, longest=30)
    path = tmp_path / "run.jsonl"
    scheduler = _record(
        path,
        executor,
        requests,
        _virtual(),
        policy=policy,
        preemption=preemption,
        mlfq_quantum=0.02,
        mlfq_promote_after=1.0,
    )
    assert scheduler.preemptions > 0
    result = replay(path.read_text().splitlines())
    assert result.difference is None
    assert result.plans > 100


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_run_of_the_demo_model_is_replayed_plan_by_plan(
    tmp_path: Path, preemption: Literal["recompute", "swap"]
) -> None:
    executor = load_executor(
        demo_model.path(),
        block_size=4,
        kv_blocks=24,
        host_kv_memory=4 * 2**20,
        max_batch_tokens=32,
        max_batch_sequences=4,
        max_context=64,
        threads=1,
    )
    try:
        path = tmp_path / "run.jsonl"
        scheduler = _record(
            path,
            executor,
            _requests(24, vocabulary=4000, longest=30),
            lambda seconds: time.monotonic(),
            policy="skip-join-mlfq",
            preemption=preemption,
            mlfq_quantum=0.005,
        )
    finally:
        executor.close()
    assert scheduler.preemptions > 0
    result = replay(path.read_text().splitlines())
    assert result.difference is None
    assert result.plans > 50


def test_the_first_difference_is_reported_where_it_is(tmp_path: Path) -> None:
    capacity = Capacity(24, 4, max_tokens=16, max_sequences=5, max_context=64)
    path = tmp_path / "run.jsonl"
    _record(
        path,
        CostModelExecutor(capacity),
        _requests(6, vocabulary=100, longest=30),
        _virtual(),
        policy="fcfs",
    )
    lines = path.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if '"submit"' in line)
    prompt = int(lines[place].split('"prompt":')[1].split(",")[0])
    lines[place] = lines[place].replace(f'"prompt":{prompt},', f'"prompt":{prompt + 1},')
    found = replay(lines)
    assert found.plans == 0
    assert found.difference is not None
    assert '"plan"' in lines[found.difference.line - 1]
    assert "r0/0[0:" in str(found.difference)


def test_a_refusal_that_was_not_recorded_is_a_difference(tmp_path: Path) -> None:
    capacity = Capacity(24, 4, max_tokens=16, max_sequences=5, max_context=64)
    path = tmp_path / "run.jsonl"
    _record(
        path,
        CostModelExecutor(capacity),
        _requests(2, vocabulary=100, longest=30),
        _virtual(),
        policy="fcfs",
    )
    header, first, *_ = path.read_text().splitlines()
    assert '"submit"' in first
    result = replay([header, first, first])
    assert result == Replay(0, result.difference)
    assert result.difference is not None
    assert (result.difference.line, result.difference.recorded) == (3, "accepted")


def test_what_is_no_recorded_run_is_refused() -> None:
    with pytest.raises(ValueError, match="not a recorded run"):
        replay(['{"version": 0}'])
