"""What arrives: requests with their true output lengths, from distributions or from traces.

Everything here is seeded: the same arguments give the same jobs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from baton.types import LengthEstimate, Request, Sampling, Stopping

EOS = 1
"""The token that ends a simulated output. All its other tokens are `PLAIN`."""

PLAIN = 0

_STOPPING_AT = frozenset({EOS})


@dataclass(frozen=True, slots=True)
class Job:
    """One request, and what only the simulator knows of it.

    `output_tokens` is the true length, the end-of-sequence token included, at most `max_tokens`,
    the cap that the scheduler sees. `arrived_at` and `deadline` in seconds from the start.
    `prompt_ids` only where they matter (prefix caching, a real engine); there are `prompt_tokens`
    of them.
    """

    id: str
    arrived_at: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    estimate: LengthEstimate | None = None
    tenant: str = ""
    priority: int = 0
    prompt_ids: tuple[int, ...] | None = None
    deadline: float | None = None

    def request(self) -> Request:
        """The request as a scheduler sees it: greedy, ended by `EOS` or `max_tokens`."""
        return Request(
            id=self.id,
            prompt_ids=self.prompt_ids or _prompt(self.prompt_tokens),
            sampling=Sampling(),
            stopping=Stopping(max_tokens=self.max_tokens, eos_token_ids=_STOPPING_AT),
            priority=self.priority,
            arrived_at=self.arrived_at,
            deadline=self.deadline,
            estimate=self.estimate,
            tenant=self.tenant,
        )


@lru_cache(maxsize=4096)
def _prompt(length: int) -> tuple[int, ...]:
    """Prompts of one length share their ids."""
    return (PLAIN,) * length


# -- Lengths -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A length distribution by its mean and coefficient of variation, before any cut."""

    mean: float
    cv: float

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` lengths, at least 1 each."""
        if self.cv == 0:
            return np.full(count, max(1, round(self.mean)), np.int64)
        variance = math.log(1 + self.cv * self.cv)
        mu = math.log(self.mean) - variance / 2
        return np.floor(rng.lognormal(mu, math.sqrt(variance), count)).astype(np.int64) + 1


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and output lengths, drawn independently; pairs beyond the limits are drawn again.

    The output limit that a scheduler sees is `max_tokens`, or all that fits behind the prompt
    if that is None.
    """

    name: str
    prompt: LogNormal
    output: LogNormal
    max_prompt: int = 1024
    max_total: int = 2048
    max_tokens: int | None = None

    def draw(self, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """`count` pairs (prompt tokens, output tokens)."""
        pairs: list[tuple[int, int]] = []
        while len(pairs) < count:
            size = max(64, 2 * (count - len(pairs)))
            prompts, outputs = self.prompt.draw(rng, size), self.output.draw(rng, size)
            if self.max_tokens is not None:
                outputs = np.minimum(outputs, self.max_tokens)
            fits = (prompts <= self.max_prompt) & (prompts + outputs <= self.max_total)
            if not fits.any():
                raise ValueError(f"{self.name}: no length fits the limits")
            pairs += zip(prompts[fits].tolist(), outputs[fits].tolist(), strict=True)
        return pairs[:count]

    def cap(self, prompt_tokens: int) -> int:
        """`max_tokens` of a request with this prompt."""
        return self.max_total - prompt_tokens if self.max_tokens is None else self.max_tokens


SHAREGPT = Lengths("sharegpt", LogNormal(161, 1.6), LogNormal(338, 1.1))
"""Log-normal, fitted to ShareGPT's first two turns under FastServe's filter."""

ALPACA = Lengths("alpaca", LogNormal(19, 0.8), LogNormal(58, 1.1))
"""Log-normal, after Alpaca: short prompts, short answers."""


def fixed(prompt: int, output: int, *, cv: float = 0.0) -> Lengths:
    """All requests alike, or around these means with coefficient of variation `cv`."""
    limit = max(prompt + output, round(4 * (prompt + output) * (cv > 0)))
    return Lengths(
        f"{prompt}/{output}",
        LogNormal(prompt, cv),
        LogNormal(output, cv),
        max_prompt=limit,
        max_total=limit,
    )


def in_out_ratio(ratio: float, *, total: int = 512, cv: float = 0.5) -> Lengths:
    """Requests of about `total` tokens, `ratio` times as many in as out."""
    output = max(1, round(total / (1 + ratio)))
    return fixed(max(1, total - output), output, cv=cv)


# -- Arrivals ------------------------------------------------------------------------------


def poisson(rate: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Arrival times at `rate` per second, independent of each other."""
    return gamma(rate, 1.0)


def gamma(rate: float, cv: float) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Arrival times whose gaps are gamma distributed: cv 1 is Poisson, more comes in bursts."""
    if rate <= 0 or cv <= 0:
        raise ValueError("rate and cv must be positive")

    def times(rng: np.random.Generator, count: int) -> np.ndarray:
        shape = 1.0 / (cv * cv)
        return np.cumsum(rng.gamma(shape, 1.0 / (rate * shape), count))

    return times


def offline(rng: np.random.Generator, count: int) -> np.ndarray:
    """All at the start."""
    return np.zeros(count)


Arrivals = Callable[[np.random.Generator, int], np.ndarray]
"""(random numbers, count) to that many times in ascending order, in seconds."""


# -- Predictions ---------------------------------------------------------------------------

Estimator = Callable[[np.random.Generator, int, int], LengthEstimate | None]
"""(random numbers, true output length, max_tokens) to what the predictor says."""


def unpredicted(rng: np.random.Generator, length: int, most: int) -> LengthEstimate | None:
    """No predictor."""
    return None


def oracle(rng: np.random.Generator, length: int, most: int) -> LengthEstimate | None:
    """The truth."""
    return LengthEstimate(tokens=length, allotment=length)


def noisy(sigma: float, *, margin: float = 1.5) -> Estimator:
    """The truth times exp(N(0, sigma)); the allotment is `margin` times the estimate."""

    def estimate(rng: np.random.Generator, length: int, most: int) -> LengthEstimate | None:
        tokens = max(1, min(most, round(length * math.exp(rng.normal(0.0, sigma)))))
        return LengthEstimate(tokens=tokens, allotment=min(most, math.ceil(margin * tokens)))

    return estimate


# -- Jobs ----------------------------------------------------------------------------------


def make_jobs(
    lengths: Lengths,
    arrivals: Arrivals,
    count: int,
    *,
    seed: int,
    estimator: Estimator = unpredicted,
    tenants: Sequence[str] = ("",),
) -> list[Job]:
    """`count` jobs by arrival. Lengths, times and predictions have random streams of their own:
    another rate or predictor leaves the lengths as they are."""
    of_lengths, of_times, of_estimates = (
        np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(3)
    )
    pairs = lengths.draw(of_lengths, count)
    times = arrivals(of_times, count).tolist()
    jobs = []
    for number, ((prompt, output), time) in enumerate(zip(pairs, times, strict=True)):
        cap = lengths.cap(prompt)
        jobs.append(
            Job(
                id=f"r{number:07d}",
                arrived_at=time,
                prompt_tokens=prompt,
                output_tokens=output,
                max_tokens=cap,
                estimate=estimator(of_estimates, output, cap),
                tenant=tenants[number % len(tenants)],
            )
        )
    return jobs


class Source:
    """Where a simulation takes its jobs from: in order of arrival, with feedback."""

    def start(self) -> Iterable[Job]:
        """The jobs that do not depend on others, by arrival."""
        raise NotImplementedError

    def finished(self, job: Job, now: float) -> Job | None:
        """A job has ended: the one that comes because of it, at `now` or later, if any."""
        return None


class OpenLoop(Source):
    """Arrivals that wait for nobody."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._jobs = sorted(jobs, key=lambda job: job.arrived_at)

    def start(self) -> Iterator[Job]:
        """All of them."""
        return iter(self._jobs)


class ClosedLoop(Source):
    """`clients` callers; each sends its next request when its last one has ended, `think`
    seconds later. The jobs' own arrival times are not used."""

    def __init__(self, jobs: Iterable[Job], clients: int, *, think: float = 0.0) -> None:
        self._rest = iter(jobs)
        self._clients = clients
        self._think = think

    def start(self) -> Iterator[Job]:
        """The first of each client, at once."""
        for _ in range(self._clients):
            job = next(self._rest, None)
            if job is None:
                return
            yield replace(job, arrived_at=0.0)

    def finished(self, job: Job, now: float) -> Job | None:
        """The next one of that client."""
        following = next(self._rest, None)
        return None if following is None else replace(following, arrived_at=now + self._think)
