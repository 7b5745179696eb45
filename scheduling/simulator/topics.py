"""Traffic whose prompts tell, to a chosen degree, how long the outputs will be.

Each prompt is about one topic. A topic has words of its own and a typical output length; the rest
of the prompt is words that all prompts share, by Zipf's law. What a predictor can know of a
length is `predictability`; how much of that it finds is its own merit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from scheduling.length import LengthPredictor, Prediction
from scheduling.simulator.traffic import SHAREGPT, Arrivals, Job, Lengths

_TOPIC_SEED = 20231
_ZIPF = 1.2
_LEAST_PROMPT = 4  # tokens: room for a word of the topic


@dataclass(frozen=True, slots=True)
class Topics:
    """`lengths` gives the marginal distributions. `predictability` is the share of the variance of
    the logarithm of the output length that the topic explains: 0 nothing, 1 all. `share` of a
    prompt's tokens are among its topic's `words`; the topics themselves are the same for every
    seed of the traffic."""

    predictability: float
    lengths: Lengths = SHAREGPT
    topics: int = 200
    words: int = 40
    share: float = 0.3
    vocabulary: int = 32_000

    def __post_init__(self) -> None:
        if not 0 <= self.predictability <= 1:
            raise ValueError("predictability must be from 0 to 1")

    @property
    def sigma(self) -> float:
        """Standard deviation of log(length) that is left when the topic is known: what no
        predictor gets below, on average, in the sense of `noisy(sigma)`."""
        return math.sqrt(1 - self.predictability) * self._spread

    @property
    def _spread(self) -> float:
        return math.sqrt(math.log(1 + self.lengths.output.cv**2))

    def jobs(self, arrivals: Arrivals, count: int, *, seed: int) -> list[Job]:
        """`count` jobs by arrival, with `prompt_ids` and without estimates. Lengths and times
        have random streams of their own: another rate leaves the prompts and lengths alone."""
        of_texts, of_times = (
            np.random.default_rng(stream) for stream in np.random.SeedSequence(seed).spawn(2)
        )
        times = arrivals(of_times, count).tolist()
        drawn = self._draw(of_texts)
        jobs = []
        for number, time in enumerate(times):
            prompt, output = next(drawn)
            job = Job(
                id=f"r{number:07d}",
                arrived_at=time,
                prompt_tokens=len(prompt),
                output_tokens=output,
                max_tokens=self.lengths.cap(len(prompt)),
                prompt_ids=prompt,
            )
            jobs.append(job)
        return jobs

    def _draw(self, rng: np.random.Generator) -> Iterator[tuple[tuple[int, ...], int]]:
        """Prompts and output lengths within the limits, for ever."""
        fixed = np.random.default_rng(_TOPIC_SEED)
        levels = fixed.normal(size=self.topics)
        levels = (levels - levels.mean()) / max(1e-9, levels.std())
        words = fixed.integers(0, self.vocabulary, (self.topics, self.words))
        known, unknown = math.sqrt(self.predictability), math.sqrt(1 - self.predictability)
        center = math.log(self.lengths.output.mean) - self._spread**2 / 2
        most = self.lengths.max_total
        while True:
            topic = int(rng.integers(self.topics))
            size = max(_LEAST_PROMPT, int(self.lengths.prompt.draw(rng, 1)[0]))
            drift = known * float(levels[topic]) + unknown * float(rng.normal())
            output = max(1, math.floor(math.exp(center + self._spread * drift)) + 1)
            if self.lengths.max_tokens is not None:
                output = min(output, self.lengths.max_tokens)
            if size > self.lengths.max_prompt or size + output > most:
                continue
            common = np.minimum(rng.zipf(_ZIPF, size), self.vocabulary - 1)
            own = words[topic][rng.integers(0, self.words, size)]
            telling = rng.random(size) < self.share
            telling[int(rng.integers(size))] = True
            yield tuple(np.where(telling, own, common).tolist()), output


def with_learned_estimates(
    jobs: Sequence[Job], predictor: LengthPredictor, *, behind: int = 0
) -> list[Job]:
    """The jobs, in their order, with what `predictor` says of each before it has seen its length.

    It learns as it goes: from a job once `behind` more have been predicted, as a server does that
    has about that many requests in flight. Warm it up by passing earlier traffic first. Jobs must
    have `prompt_ids`; an output of `max_tokens` counts as cut.
    """
    waiting: deque[tuple[Prediction, Job]] = deque()
    estimated = []
    for job in jobs:
        if job.prompt_ids is None:
            raise ValueError(f"job {job.id} has no prompt ids")
        prediction = predictor.predict(job.prompt_ids, job.max_tokens)
        estimated.append(replace(job, estimate=prediction.estimate))
        waiting.append((prediction, job))
        if len(waiting) > behind:
            _learn(predictor, *waiting.popleft())
    for late in waiting:
        _learn(predictor, *late)
    return estimated


def _learn(predictor: LengthPredictor, prediction: Prediction, job: Job) -> None:
    if job.output_tokens < job.max_tokens:
        predictor.learn(prediction, job.output_tokens)
    else:
        predictor.learn_cut(prediction, job.output_tokens)
