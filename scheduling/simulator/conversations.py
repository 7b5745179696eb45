"""Arrivals that come back: talks of several turns, whose prompts hold all that was said before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from scheduling.simulator.traffic import EOS, PLAIN, Estimator, Job, LogNormal, Source, unpredicted

_FIRST_WORD = 2  # smaller ids are output
_WORDS = 1 << 30
_SAID = LogNormal(60, 1.0)
_ANSWERED = LogNormal(150, 0.8)


@dataclass(frozen=True, slots=True)
class Talks:
    """What talks are like. Each begins with one of `prompts` system prompts, which all talks share
    that have it; `turns` on average, geometrically distributed. What a user says and what is
    answered are drawn anew at each turn. `think`: mean seconds from an answer to the next turn.
    A talk ends before it would be longer than `max_total` tokens."""

    rate: float  # talks that begin, per second
    prompts: int = 4
    prompt_tokens: int = 600
    turns: float = 5.0
    said: LogNormal = _SAID
    answered: LogNormal = _ANSWERED
    think: float = 5.0
    max_total: int = 4000
    max_tokens: int = 600


class Conversations(Source):
    """Seeded: what is said depends on nothing that happens in the simulation."""

    def __init__(
        self, talks: Talks, count: int, *, seed: int, estimator: Estimator = unpredicted
    ) -> None:
        """`count` talks."""
        rng = np.random.default_rng(seed)
        begins = np.cumsum(rng.exponential(1 / talks.rate, count)).tolist()
        shared = [_words(rng, talks.prompt_tokens) for _ in range(talks.prompts)]
        self._talks = [
            _talk(f"t{number:05d}", talks, shared[number % len(shared)], at, rng, estimator)
            for number, at in enumerate(begins)
        ]
        self._pauses = [rng.exponential(talks.think, len(talk)).tolist() for talk in self._talks]

    @property
    def jobs(self) -> int:
        """All turns of all talks."""
        return sum(map(len, self._talks))

    def turns(self) -> Iterator[Job]:
        """All turns of all talks, each as if it came when its talk begins."""
        return (job for talk in self._talks for job in talk)

    def start(self) -> Iterator[Job]:
        """The first turns."""
        return (talk[0] for talk in self._talks)

    def finished(self, job: Job, now: float) -> Job | None:
        """The next turn of that talk."""
        talk, turn = (int(part[1:]) for part in job.id.split("-"))
        if turn + 1 == len(self._talks[talk]):
            return None
        following = self._talks[talk][turn + 1]
        return replace(following, arrived_at=now + self._pauses[talk][turn])


def _talk(
    name: str,
    talks: Talks,
    prompt: tuple[int, ...],
    begins: float,
    rng: np.random.Generator,
    estimator: Estimator,
) -> list[Job]:
    """All turns of one talk. Only the first one's time is known."""
    jobs: list[Job] = []
    count = int(rng.geometric(1 / talks.turns))
    said = talks.said.draw(rng, count).tolist()
    answered = np.minimum(talks.answered.draw(rng, count), talks.max_tokens).tolist()
    for turn in range(count):
        prompt = (*prompt, *_words(rng, said[turn]))
        if jobs and len(prompt) + talks.max_tokens > talks.max_total:
            break
        jobs.append(
            Job(
                id=f"{name}-n{turn:03d}",
                arrived_at=begins,
                prompt_tokens=len(prompt),
                output_tokens=answered[turn],
                max_tokens=talks.max_tokens,
                estimate=estimator(rng, answered[turn], talks.max_tokens),
                prompt_ids=prompt,
            )
        )
        prompt = (*prompt, *(PLAIN,) * (answered[turn] - 1), EOS)
    return jobs


def _words(rng: np.random.Generator, count: int) -> tuple[int, ...]:
    return tuple(rng.integers(_FIRST_WORD, _WORDS, count).tolist())
