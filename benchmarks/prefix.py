"""What the prefix cache saves: the same conversations with it and without, on one engine.

    python benchmarks/prefix.py [--conversations 8] [--turns 4] [--system 256] [--question 48]
        [--answer 64] [--repeats 5] [--threads 0] [--model DIR]

All conversations begin with one system prompt, and each turn's prompt is the last one, its answer
and a question. The questions of a turn come at once, and the next turn's when all are answered. The
two take turns. How many tokens are computed follows from the lengths alone; times are medians over
the repeats of the mean time to first token.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import demo_model
from baton.prefix import block_keys
from baton.types import Output, Request, Sampling, Stopping
from engine.load import load_executor
from engine.model.runner import TorchExecutor
from scheduling.decode import DecodeScheduler
from scheduling.order import make_policy

_FIRST_TOKEN = 100  # of the vocabulary: those before it may be special


@dataclass(frozen=True, slots=True)
class Talk:
    """The sizes of the conversations, in tokens but for the first two."""

    conversations: int
    turns: int
    system: int
    question: int
    answer: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run of all conversations took."""

    computed: int  # tokens of prompts
    first_tokens: tuple[float, ...]  # seconds, of each request
    answers: tuple[tuple[int, ...], ...]

    @property
    def mean_first_token(self) -> float:
        """Seconds."""
        return statistics.fmean(self.first_tokens)


class Run:
    """All conversations, once, on a scheduler of their own."""

    def __init__(self, executor: TorchExecutor, *, cache: bool) -> None:
        self._executor = executor
        self._scheduler = DecodeScheduler(
            executor.capacity,
            make_policy("fcfs"),
            max_waiting=1 << 20,
            block_keys=block_keys if cache else None,
        )
        self._computed = 0
        self._first_tokens: list[float] = []

    def talk(self, talk: Talk, seed: int) -> Measured:
        """Ask, and take the answers for the next prompts."""
        rng = random.Random(seed)

        def words(count: int) -> list[int]:
            limit = self._executor.model.vocab_size
            return [rng.randrange(_FIRST_TOKEN, limit) for _ in range(count)]

        system = words(talk.system)
        prompts = [list(system) for _ in range(talk.conversations)]
        for turn in range(talk.turns):
            for prompt in prompts:
                prompt += words(talk.question)
            requests = [
                Request(f"{turn}/{i}", tuple(prompt), Sampling(), Stopping(talk.answer))
                for i, prompt in enumerate(prompts)
            ]
            answers = self._answer(requests)
            for prompt, request in zip(prompts, requests, strict=True):
                prompt += answers[request.id]
        return Measured(self._computed, tuple(self._first_tokens), tuple(map(tuple, prompts)))

    def _answer(self, requests: list[Request]) -> dict[str, list[int]]:
        began = time.perf_counter()
        for request in requests:
            self._scheduler.submit(request, began)
        answers: dict[str, list[int]] = {request.id: [] for request in requests}
        while (plan := self._scheduler.plan(time.perf_counter())) is not None:
            self._computed += sum(c.length for c in plan.chunks if not c.sequence.generating)
            result = self._executor.execute(plan)
            now = time.perf_counter()
            for event in self._scheduler.apply(plan, result, now):
                if isinstance(event, Output):
                    if not answers[event.request_id]:
                        self._first_tokens.append(now - began)
                    answers[event.request_id] += event.token_ids
        return answers


def compare(executor: TorchExecutor, talk: Talk, repeats: int) -> tuple[list[Measured], ...]:
    """Runs without the cache, and with it, in turn."""
    found: tuple[list[Measured], list[Measured]] = ([], [])
    for repeat in range(repeats):
        for cache in (False, True):
            found[cache].append(Run(executor, cache=cache).talk(talk, repeat))
    return found


def main() -> None:
    """Print the two ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("conversations", 8),
        ("turns", 4),
        ("system", 256),
        ("question", 48),
        ("answer", 64),
        ("repeats", 5),
        ("threads", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", type=Path, default=demo_model.path())
    options = parser.parse_args()
    talk = Talk(
        options.conversations, options.turns, options.system, options.question, options.answer
    )
    executor = load_executor(options.model, threads=options.threads)
    executor.warm_up()
    try:
        without, with_it = compare(executor, talk, options.repeats)
    finally:
        executor.close()
    computed = [runs[0].computed for runs in (without, with_it)]
    print(
        f"prompt tokens computed: {computed[0]} without, {computed[1]} with the cache: "
        f"{computed[0] / computed[1]:.2f} times as many"
    )
    first = [statistics.median(r.mean_first_token for r in runs) for runs in (without, with_it)]
    print(
        f"mean time to first token: {first[0] * 1e3:.1f} ms without, {first[1] * 1e3:.1f} ms with: "
        f"{first[0] / first[1]:.2f} times as long"
    )
    pairs = zip(without, with_it, strict=True)
    same = sum(a == b for x, y in pairs for a, b in zip(x.answers, y.answers, strict=True))
    print(f"the same in every token: {same} of {options.repeats * talk.conversations}")


if __name__ == "__main__":
    main()
