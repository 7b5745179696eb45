"""The requests that every system serves, drawn from a seed. Output lengths are forced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_LOWEST_TOKEN = 3  # below are the tokens that mark beginnings and ends


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: exactly `output` tokens wanted."""

    prompt: tuple[int, ...]
    output: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that all arrive at once. A single one is judged by latency, many by throughput."""

    name: str
    asks: tuple[Ask, ...]

    @property
    def output_tokens(self) -> int:
        """Tokens wanted by all of them together."""
        return sum(ask.output for ask in self.asks)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt plus output."""
        return max(len(ask.prompt) + ask.output for ask in self.asks)


def batch(vocabulary: int, seed: int) -> Workload:
    """W1: 64 requests, lognormal lengths: prompts of mean 128, outputs of mean 64."""
    random = np.random.default_rng(seed)
    prompts = _lognormal(random, mean=128, sigma=0.8, low=8, high=512)
    outputs = _lognormal(random, mean=64, sigma=0.7, low=4, high=256)
    asks = tuple(
        Ask(_tokens(random, vocabulary, prompt), output)
        for prompt, output in zip(prompts, outputs, strict=True)
    )
    return Workload("w1", asks)


def stream(vocabulary: int, seed: int) -> Workload:
    """W2: one request, 512 tokens in and 128 out."""
    random = np.random.default_rng(seed)
    return Workload("w2", (Ask(_tokens(random, vocabulary, 512), 128),))


def warm_up(vocabulary: int) -> Workload:
    """A little of both, so that whatever is made on first use is there."""
    random = np.random.default_rng(0)
    lengths = (512, 200, 64, 32, 16, 16, 8, 8)
    return Workload("warm-up", tuple(Ask(_tokens(random, vocabulary, n), 8) for n in lengths))


WORKLOADS: dict[str, Callable[[int, int], Workload]] = {"w1": batch, "w2": stream}
"""By name: from the vocabulary's size and a seed."""


def _lognormal(
    random: np.random.Generator, *, mean: float, sigma: float, low: int, high: int, count: int = 64
) -> list[int]:
    """Lengths whose mean is `mean` before they are cut at the bounds."""
    drawn = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return [int(length) for length in np.clip(np.round(drawn), low, high)]


def _tokens(random: np.random.Generator, vocabulary: int, count: int) -> tuple[int, ...]:
    return tuple(int(token) for token in random.integers(_LOWEST_TOKEN, vocabulary, count))
