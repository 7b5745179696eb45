"""How well output lengths are predicted, and at what cost: `python tools/measure_lengths.py`.

Every output is judged by what was said before it was learnt from. The demo model's answers are
those of experiments/data/demo_lengths.json; the other traffic is made by
scheduling/simulator/topics.py.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from scheduling.length import LengthPredictor, PredictorSettings
from scheduling.length_buckets import Buckets
from scheduling.length_report import TALLIES, report
from scheduling.simulator.topics import Topics
from scheduling.simulator.traffic import poisson

DEMO = Path(__file__).resolve().parent.parent / "experiments" / "data" / "demo_lengths.json"
SEEDS = 5
HEAD = (
    "traffic                              accuracy majority  mae  (mean)  buckets    ece  exceeded "
    "reserved  sigma  SJF/oracle (mean, median)  FCFS/oracle"
)

Served = tuple[tuple[int, ...], int, int]
"""Prompt, output tokens, max_tokens."""


class Account:
    """Judgements of some traffic, without fading."""

    def __init__(self) -> None:
        self._tallies = np.zeros(TALLIES)
        self._pairs: list[tuple[float, float, int]] = []

    def serve(self, predictor: LengthPredictor, traffic: Iterable[Served], *, note: bool) -> None:
        """Predict, note, learn."""
        for prompt, tokens, most in traffic:
            prediction = predictor.predict(prompt, most)
            if note:
                self._tallies += predictor.judged(prediction, tokens).tally()
                ends = predictor.settings.buckets.edges
                middle = int(np.searchsorted(prediction.probabilities.cumsum(), 0.5))
                median = ends[min(middle, len(ends) - 1)]
                self._pairs.append((prediction.guess.tokens, median, tokens))
            (predictor.learn if tokens < most else predictor.learn_cut)(prediction, tokens)

    def line(self, name: str) -> str:
        """One row of the table."""
        found = report(self._tallies, 0)
        assert found is not None
        sigma = statistics.pstdev(math.log(said / true) for said, _, true in self._pairs)
        lengths = np.array([true for *_, true in self._pairs], float)
        best = _mean_end(lengths, lengths)
        by_mean, by_median = (
            _mean_end(lengths, [pair[i] for pair in self._pairs]) / best for i in (0, 1)
        )
        fcfs = _mean_end(lengths, range(len(lengths))) / best
        return (
            f"{name:36} {found.accuracy:8.3f} {found.majority_accuracy:8.3f} "
            f"{found.error_tokens:6.1f} ({found.majority_error_tokens:5.1f}) "
            f"{found.error_buckets:6.2f} {found.calibration_error:8.3f} {found.exceeded:8.3f} "
            f"{found.reserved:8.2f} {sigma:7.2f}  {by_mean:8.3f} {by_median:8.3f} {fcfs:16.2f}"
        )


def _mean_end(lengths: np.ndarray, keys: Sequence[float] | np.ndarray | range) -> float:
    """Mean time of the ends, one after the other in the order of `keys`."""
    return float(lengths[np.argsort(keys, kind="stable")].cumsum().mean())


def demo() -> None:
    """Passes over the demo model's own answers, each in another order."""
    rows = json.loads(DEMO.read_text())
    most = rows["max_tokens"]
    served = [(tuple(r["prompt_ids"]), r["output_tokens"], most) for r in rows["requests"]]
    accounts = [Account() for _ in range(3)]
    for seed in range(SEEDS):
        predictor = LengthPredictor(PredictorSettings(Buckets.geometric(1024)))
        for number, account in enumerate(accounts):
            random.Random(10 * seed + number).shuffle(served)
            account.serve(predictor, served, note=True)
    for number, account in enumerate(accounts):
        print(account.line(f"demo model, pass {number + 1}"))


def topics() -> None:
    """ShareGPT-like traffic, after 3,000 requests."""
    kinds = {"geometric": Buckets.geometric(2048), "S3's": Buckets.equal_width(2048)}
    for predictability in (0.0, 0.5, 0.8, 0.95):
        of = Topics(predictability)
        for name, buckets in kinds.items():
            account = Account()
            for seed in range(SEEDS):
                jobs = of.jobs(poisson(1.0), 5000, seed=seed)
                served = [(j.prompt_ids or (), j.output_tokens, j.max_tokens) for j in jobs]
                predictor = LengthPredictor(PredictorSettings(buckets))
                account.serve(predictor, served[:3000], note=False)
                account.serve(predictor, served[3000:], note=True)
            print(account.line(f"topics {predictability}, {name} (sigma {of.sigma:.2f})"))


def cost() -> None:
    """CPU time of one request; memory that is cold counts, so every prompt is another."""
    for size in (16, 128, 512, 2048):
        predictor = LengthPredictor(PredictorSettings(Buckets.geometric(8192)))
        rng = random.Random(size)
        times = []
        for _ in range(500):
            prompt = tuple(rng.randrange(32_000) for _ in range(size))
            started = time.process_time_ns()
            prediction = predictor.predict(prompt, 1000)
            said = time.process_time_ns()
            predictor.learn(prediction, rng.randrange(1, 900))
            times.append((said - started, time.process_time_ns() - said))
        predict, learn = (statistics.median(column) / 1e3 for column in zip(*times, strict=True))
        worst = sorted(sum(pair) for pair in times)[int(0.99 * len(times))] / 1e3
        print(
            f"{size:5} prompt tokens: predict {predict:.0f} us, learn {learn:.0f} us, "
            f"both 99% under {worst:.0f} us, state {len(predictor.to_bytes()) / 1000:.0f} kB"
        )


def main() -> None:
    """All of it, in a few minutes."""
    cost()
    print(f"\n{HEAD}")
    demo()
    topics()


if __name__ == "__main__":
    main()
