"""What is recorded is all that decides: told the same, a fresh scheduler plans the same."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from baton.config import DecodeConfig, PrefillConfig
from baton.errors import BatonError, ConfigError
from baton.prefix import block_keys
from baton.types import LengthEstimate, PriorOutput, Request, Sampling, Stopping
from engine.recording import (
    RecordedDecodeScheduler,
    RecordedPrefillScheduler,
    RunRecorder,
    recorder_from,
)
from engine.simulated import CostModelExecutor, checksum_token
from scheduling.cost import CostTracker, LinearCost
from scheduling.decode import DecodeScheduler
from scheduling.events import Prefilled, PrefillStarted
from scheduling.order import policy_from
from scheduling.plan import Capacity
from scheduling.prefill import PrefillScheduler
from scheduling.rules import Rules
from scheduling.sequence import Phase, Sequence
from scheduling.simulator import record
from scheduling.simulator.record import read_run
from scheduling.simulator.replay import replay

CAPACITY = Capacity(
    blocks=24, block_size=4, max_tokens=16, max_sequences=4, max_context=64, host_blocks=24
)


PIPELINE = replace(CAPACITY, blocks=60, depth=3)


def scheduler_for(config: Any, recorder: RunRecorder, capacity: Capacity = CAPACITY) -> Any:
    """The scheduler of a worker that records."""
    cost = CostTracker()
    policy, most = policy_from(config, cost), config.max_waiting
    options: dict[str, Any] = {"max_waiting": most, "cost": cost}
    options["block_keys"] = block_keys if config.prefix_cache else None
    if isinstance(config, PrefillConfig):
        return RecordedPrefillScheduler(capacity, policy, recorder, **options)
    return RecordedDecodeScheduler(capacity, policy, recorder, rules=Rules.of(config), **options)


class Traffic:
    """Calls into a scheduler, at random but seeded, as a worker makes them."""

    def __init__(self, scheduler: Any, seed: int) -> None:
        self.scheduler = scheduler
        self.random = random.Random(seed)
        self.executor = CostModelExecutor(
            CAPACITY, LinearCost(0.01, 0.001), checksum_token(20), swap_seconds_per_block=0.002
        )
        self.now = 0.0
        self.names: list[str] = []
        self.prompts: list[tuple[int, ...]] = []
        self.incoming: list[Sequence] = []
        self.handed_over: dict[str, list[int]] = {}

    def run(self, calls: int) -> None:
        """A few calls, then everything that is left."""
        for _ in range(calls):
            self.now += self.random.random() * 0.01
            self.random.choice([self.submit, self.submit, self.come, self.abort, self.step])()
        for sequence in list(self.incoming):
            self.settle(sequence)
        while self.step():
            pass
        self.scheduler.check_integrity()

    def request(self) -> Request:
        pick, name = self.random.randrange, f"r{len(self.names)}"
        self.names.append(name)
        known = self.random.choice(self.prompts or [()])
        prompt = (*known[: pick(len(known) + 1)], *(pick(20) for _ in range(pick(1, 12))))[:30]
        self.prompts.append(prompt)
        return Request(
            name,
            prompt,
            Sampling(
                seed=pick(9), n=1 if isinstance(self.scheduler, PrefillScheduler) else pick(1, 3)
            ),
            Stopping(pick(1, 60), min_tokens=pick(4), eos_token_ids=frozenset({7})),
            priority=pick(2),
            level=pick(3),
            arrived_at=self.now,
            deadline=self.now + pick(1, 5),
            estimate=self.random.choice([None, LengthEstimate(8, 12)]),
            prior_outputs=self.random.choice([(), (PriorOutput((1, 2, 3, 4, 5)),) * 2]),
            tenant=self.random.choice(["", "", "a"]),
            prompt_logprobs=self.random.choice([None] * 5 + [0]),
            bypass_cache=self.random.random() < 0.1,
        )

    def submit(self) -> None:
        with contextlib.suppress(BatonError):
            self.scheduler.submit(self.request(), self.now)

    def come(self) -> None:
        """A hand-off begins, or ends."""
        if isinstance(self.scheduler, PrefillScheduler):
            return
        if self.incoming and self.random.random() < 0.6:
            self.settle(self.random.choice(self.incoming))
            return
        with contextlib.suppress(BatonError):
            self.incoming.append(self.scheduler.reserve(self.request(), self.now))

    def settle(self, sequence: Sequence) -> None:
        self.incoming.remove(sequence)
        if sequence.phase is Phase.FINISHED and self.random.random() < 0.5:
            self.scheduler.quiet(sequence)
        elif self.random.random() < 0.3:
            self.scheduler.lost(sequence, 7, self.now)
        else:
            for place, block in enumerate(sequence.blocks):  # as a transfer fills them
                if 4 * place < sequence.cached:
                    continue
                tokens = sequence.tokens[4 * place : 4 * place + 4]
                view = self.executor.store.block(block).cast("i")
                view[: len(tokens)] = memoryview(bytearray(4 * len(tokens))).cast("i")
            self.scheduler.arrived(sequence, self.random.randrange(20), self.now)

    def abort(self) -> None:
        if not self.names:
            return
        name, chance = self.random.choice(self.names), self.random.random()
        if chance < 0.4:
            self.scheduler.abort(name, self.now)
        elif chance < 0.7 and isinstance(self.scheduler, DecodeScheduler):
            self.scheduler.abort_sequence(name, self.random.randrange(3))

    def step(self) -> bool:
        plan = self.scheduler.plan(self.now)
        if plan is None:
            return False
        if self.random.random() < 0.3:
            self.abort()
        if self.random.random() < 0.03 and not (plan.swap_out or plan.swap_in):
            self.scheduler.fail(plan, self.now)
            return True
        result = self.executor.execute(plan)
        self.now += result.seconds
        for event in self.scheduler.apply(plan, result, self.now):
            match event:
                case PrefillStarted(sequence):
                    self.handed_over[sequence.request.id] = sequence.blocks
                case Prefilled(sequence):
                    self.scheduler.release(self.handed_over.pop(sequence.request.id))
        return True


CONFIGS = [
    PrefillConfig(policy="fcfs", max_waiting=6),
    PrefillConfig(policy="skip-join-mlfq", max_waiting=6, mlfq_quantum=0.02),
    DecodeConfig(policy="fcfs", max_waiting=6),
    DecodeConfig(policy="skip-join-mlfq", max_waiting=6, mlfq_quantum=0.02),
    DecodeConfig(policy="predicted-srpt", max_waiting=6, admission="reserve-predicted"),
    DecodeConfig(policy="skip-join-mlfq", preemption="swap", mlfq_quantum=0.02),
    DecodeConfig(policy="fcfs", preemption="swap", swapping="reactive"),
    DecodeConfig(policy="skip-join-mlfq", preemption="auto", batching="prefill-first"),
    PrefillConfig(policy="fcfs", max_waiting=6, prefix_cache=False),
    DecodeConfig(policy="fcfs", max_waiting=6, prefix_cache=False),
]


@pytest.mark.parametrize("kind", [PrefillConfig, DecodeConfig])
def test_runs_with_several_plans_in_flight_are_replayed(kind: Any, tmp_path: Path) -> None:
    config = kind(policy="fcfs", record_run=tmp_path / "run.jsonl")
    role, capacity = config.__class__.__name__.removesuffix("Config").lower(), PIPELINE
    recorder = recorder_from(config, role, capacity, LinearCost())
    assert recorder
    with contextlib.closing(recorder):
        scheduler = scheduler_for(config, recorder, capacity)
        executor = CostModelExecutor(capacity, LinearCost(0.01, 0.001))
        for i in range(6):
            scheduler.submit(Request(f"r{i}", (i,) * (4 + 3 * i), Sampling(), Stopping(5)), 0.0)
        flights: deque[Any] = deque()
        while (plan := scheduler.plan(0.0)) is not None or flights:
            if plan is not None:
                flights.append((plan, executor.submit(plan)))
            if plan is None or len(flights) == capacity.depth:
                ended, handle = flights.popleft()
                scheduler.apply(ended, executor.result(handle), 0.0)
    lines = config.record_run.read_text().splitlines()
    assert read_run(lines)[0].capacity == capacity
    result = replay(lines)
    assert result.difference is None
    assert result.plans >= 6


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "config", CONFIGS, ids=[f"{type(c).__name__}-{c.policy}-{i}" for i, c in enumerate(CONFIGS)]
)
def test_a_fresh_scheduler_that_is_told_the_same_plans_the_same(
    config: Any, seed: int, tmp_path: Path
) -> None:
    role = "prefill" if isinstance(config, PrefillConfig) else "decode"
    config = config.model_copy(update={"record_run": tmp_path / "run.jsonl"})
    recorder = recorder_from(config, role, CAPACITY, LinearCost())
    assert recorder
    with contextlib.closing(recorder):
        scheduler = scheduler_for(config, recorder)
        Traffic(scheduler, seed).run(calls=150)
    assert (scheduler.prefixes.found > 0) == config.prefix_cache

    lines = config.record_run.read_text().splitlines()
    header, rest = read_run(lines)
    records = list(rest)
    assert (header.role, header.capacity) == (role, CAPACITY)
    result = replay(lines)
    assert result.difference is None
    assert result.plans == sum(isinstance(r, record.Plan) and r.digest is not None for r in records)
    assert result.plans >= 10
    kinds = {type(one) for one in records}
    assert {record.Submit, record.Plan, record.Apply, record.Abort} <= kinds
    if getattr(config, "preemption", "recompute") == "swap":
        assert any(isinstance(one, record.Apply) and one.swapped for one in records)


def test_a_recording_tells_which_prompts_begin_alike_and_no_token(tmp_path: Path) -> None:
    config = DecodeConfig(policy="fcfs", record_run=tmp_path / "run.jsonl")
    recorder = recorder_from(config, "decode", CAPACITY, LinearCost())
    assert recorder
    with contextlib.closing(recorder):
        scheduler = scheduler_for(config, recorder)
        ids = tuple(range(700, 711))
        scheduler.submit(Request("a", ids[:9], Sampling(), Stopping(9)), 0.0)
        scheduler.submit(Request("b", (*ids[:4], *ids), Sampling(), Stopping(9)), 0.0)
        executor = CostModelExecutor(CAPACITY)
        while plan := scheduler.plan(0.0):
            scheduler.apply(plan, executor.execute(plan), 0.0)
    _, records = read_run(config.record_run.read_text().splitlines())
    told = list(records)
    first, second = (one.request.blocks for one in told if isinstance(one, record.Submit))
    assert (len(first), len(second)) == (2, 3)
    assert first[0] == second[0]
    assert not {*first[1:]} & {*second[1:]}
    kept = {token for one in told if isinstance(one, record.Apply) for token in one.sampled}
    numbers = sorted({*first, *second, *kept} - {record.GOES_ON, None})
    assert numbers == list(range(2, 2 + len(numbers))), "nothing but numbers of blocks"
    assert len(numbers) > 5, "those of generated tokens among them"


def test_nothing_is_recorded_unless_asked_for_and_a_bad_path_is_told() -> None:
    assert recorder_from(DecodeConfig(), "decode", CAPACITY, LinearCost()) is None
    bad = DecodeConfig(record_run=Path("/nowhere/run.jsonl"))
    with pytest.raises(ConfigError, match="record-run"):
        recorder_from(bad, "decode", CAPACITY, LinearCost())
