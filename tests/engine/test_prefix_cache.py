"""Conversations on a real model with a prefix cache: every token is that of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from baton.prefix import block_keys
from baton.types import Output, Request, Sampling, Stopping
from engine.load import load_executor
from engine.model.runner import TorchExecutor
from scheduling.decode import DecodeScheduler
from scheduling.order import make_policy
from scheduling.rules import Rules
from tests.engine.conftest import COMPILED

SYSTEM = tuple(3 + i * 11 % 60 for i in range(13))  # what all conversations begin with
SWAP, RECOMPUTE = Rules(preemption="swap", swapping="reactive"), Rules(preemption="recompute")
# Two logits so near to each other are a draw, as in test_swapped_generation.py.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.5, "int8": 0.5, "fp8": 1.5}

FORMATS = [
    pytest.param(backend, kv, id=f"{backend}-{kv}", marks=marks)
    for backend, marks in (("torch", ()), ("native", COMPILED))
    for kv in ("float32", "bfloat16", "int8", "fp8")
    if (backend, kv) != ("native", "fp8")  # the compiled backend has no float8
]


class Chats:
    """Conversations side by side on one worker, on a clock that counts passes."""

    def __init__(self, executor: TorchExecutor, rules: Rules, policy: str, *, cache: bool) -> None:
        self.executor = executor
        self.scheduler = DecodeScheduler(
            executor.capacity,
            make_policy(policy),
            max_waiting=99,
            rules=rules,
            block_keys=block_keys if cache else None,
        )
        self.answers: dict[tuple[str, int], list[int]] = {}
        self.computed = 0
        self.answer = 6  # tokens of each
        self.now = 0.0

    def submit(self, id: str, prompt: tuple[int, ...], n: int) -> None:
        request = Request(id, prompt, Sampling(n=n), Stopping(max_tokens=self.answer))
        self.scheduler.submit(request, self.now)

    def run(self) -> None:
        while (plan := self.scheduler.plan(self.now)) is not None:
            self.computed += plan.tokens
            result = self.executor.execute(plan)
            self.now += 0.1
            for event in self.scheduler.apply(plan, result, self.now):
                if isinstance(event, Output):
                    tokens = self.answers.setdefault((event.request_id, event.index), [])
                    tokens += event.token_ids
            self.scheduler.check_integrity()

    def talk(self, model: Any, rounding: float, *, chats: int = 4, turns: int = 3) -> None:
        """Each turn's prompt is the last one, its answer and something new."""
        prompts = {f"c{i}": (*SYSTEM, *range(15 * i + 5, 15 * i + 10)) for i in range(chats)}
        for turn in range(turns):
            for number, (name, prompt) in enumerate(prompts.items()):
                self.submit(f"{name}/{turn}", prompt, n=1 + number % 2)
            self.run()
            for number, (name, prompt) in enumerate(prompts.items()):
                for index in range(1 + number % 2):
                    answer = self.answers[f"{name}/{turn}", index]
                    assert len(answer) == self.answer
                    model.assert_generates(prompt, answer, rounding=rounding)
                prompts[name] = (*prompt, *answer, *(50 + turn * 3 + i for i in range(4)))
        assert self.scheduler.load().free_blocks == self.executor.capacity.blocks


@pytest.fixture
def start(tiny: Callable[..., Any]) -> Iterator[Callable[..., TorchExecutor]]:
    executors = []

    def make(backend: str, kv: str, blocks: int) -> TorchExecutor:
        scaled = kv in ("int8", "fp8")
        executor = load_executor(
            tiny("llama").path,
            threads=1,
            block_size=4,
            kv_blocks=blocks,
            host_kv_memory=2**18,
            max_batch_tokens=16,
            dtype="float32" if scaled else kv,
            kv_dtype=kv if scaled else "auto",
            attention_backend=backend,
        )
        executors.append(executor)
        return executor

    yield make
    for executor in executors:
        executor.close()


@pytest.mark.parametrize(("backend", "kv"), FORMATS)
def test_conversations_get_transformers_tokens_and_half_of_the_work(
    backend: str, kv: str, tiny: Callable[..., Any], start: Callable[..., TorchExecutor]
) -> None:
    computed = []
    for cache in (False, True):
        chats = Chats(start(backend, kv, blocks=90), RECOMPUTE, "fcfs", cache=cache)
        chats.talk(tiny("llama"), ROUNDING[kv])
        computed.append(chats.computed)
    assert computed[1] < 0.55 * computed[0]
    assert chats.scheduler.preemptions == 0


@pytest.mark.parametrize("policy", ["fcfs", "mlfq", "skip-join-mlfq", "predicted-srpt"])
@pytest.mark.parametrize("rules", [SWAP, RECOMPUTE], ids=["swap", "recompute"])
@pytest.mark.parametrize(("backend", "kv"), FORMATS)
def test_short_of_memory_too(
    policy: str,
    rules: Rules,
    backend: str,
    kv: str,
    tiny: Callable[..., Any],
    start: Callable[..., TorchExecutor],
) -> None:
    """Room for two conversations: their sequences are swapped, or recomputed, on the way."""
    chats = Chats(start(backend, kv, blocks=19), rules, policy, cache=True)
    chats.talk(tiny("llama"), ROUNDING[kv])
    assert chats.scheduler.prefixes.found > 0
    counters = chats.scheduler.counters
    assert (counters.swapped_in if rules is SWAP else counters.recomputed) > 0
