"""Jobs whose lengths are predicted while they come, by a predictor that learns while they end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np

from experiments.experiment import Run
from experiments.traffic import Traffic
from scheduling.length import LengthPredictor, Prediction, PredictorSettings
from scheduling.length_buckets import Buckets
from scheduling.simulator.topics import with_learned_estimates
from scheduling.simulator.traffic import Job, Source, offline

WARM = 3000
"""Requests that a predictor has learnt from before a run begins."""

_WARM_SEED = 77_777


class Learning(Source):
    """Each job is predicted when it arrives, from what had ended by then (prequential)."""

    def __init__(self, jobs: Sequence[Job], predictor: LengthPredictor) -> None:
        """`predictor` is changed."""
        self._jobs = jobs
        self._predictor = predictor
        self._open: dict[str, Prediction] = {}

    def start(self) -> Iterator[Job]:
        """By arrival; predicted when they are asked for."""
        for job in self._jobs:
            assert job.prompt_ids is not None
            prediction = self._predictor.predict(job.prompt_ids, job.max_tokens)
            self._open[job.id] = prediction
            yield replace(job, estimate=prediction.estimate)

    def finished(self, job: Job, now: float) -> None:
        """Learn its length."""
        prediction = self._open.pop(job.id)
        if job.output_tokens < job.max_tokens:
            self._predictor.learn(prediction, job.output_tokens)
        else:
            self._predictor.learn_cut(prediction, job.output_tokens)


@dataclass(frozen=True, slots=True)
class Warm:
    """A predictor that has seen `WARM` requests of some traffic, and how good it was then:
    `sigma` is the standard deviation of log(predicted over true) of fresh requests."""

    predictor: LengthPredictor
    sigma: float

    def copy(self) -> LengthPredictor:
        """One to go on with."""
        return deepcopy(self.predictor)


def warm(run: Run, traffic: Traffic) -> Warm:
    """The predictor of a traffic, taught once per run, on other requests than the runs have."""
    return run.once(("warm", traffic.name), lambda: _teach(traffic))


def _teach(traffic: Traffic) -> Warm:
    predictor = LengthPredictor(PredictorSettings(Buckets.geometric(traffic.longest)))
    jobs = traffic.jobs(offline, WARM + 500, _WARM_SEED)
    with_learned_estimates(jobs[:WARM], predictor, behind=16)
    judged = with_learned_estimates(jobs[WARM:], deepcopy(predictor), behind=16)
    errors = [
        math.log(job.estimate.tokens / job.output_tokens)
        for job in judged
        if job.estimate is not None
    ]
    return Warm(predictor, float(np.std(errors)))
