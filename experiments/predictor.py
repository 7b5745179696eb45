"""B9: how good length predictions are, beside the majority class; what a request pays for them;
and what accuracy is worth to admission."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from baton.types import LengthEstimate
from experiments import plots
from experiments.admission import Way, by, serve
from experiments.benches import rotated
from experiments.collect import Point, Samples
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.records import Record, Results
from experiments.traffic import Traffic, of_demo, of_topics
from scheduling.length import LengthPredictor, PredictorSettings
from scheduling.length_buckets import Buckets
from scheduling.rules import Rules
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.topics import Topics
from scheduling.simulator.traffic import Estimator, Job, offline, oracle

NAME = "B9"
ACCURACIES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CLASSES = Buckets.equal_width(2048)
"""S3's ten classes."""

_SHARES = (0.0, 0.5, 0.7, 0.9)  # of the variance of log(length) that prompts explain
_RULES = {
    "reserve-sum": Rules(admission="reserve-sum"),
    "reserve-predicted": Rules(admission="reserve-predicted"),
}
_BEHIND = 32  # requests in flight


def accurate(share: float) -> Estimator:
    """Names the right one of S3's ten classes for `share` of the requests, and one next to it for
    the others: S3's predictor is wrong by one class when it is wrong. The allotment is the class's
    upper end, the expected length its middle."""

    def estimate(rng: np.random.Generator, length: int, most: int) -> LengthEstimate:
        right = CLASSES.of(length)
        wrong, away = rng.random() >= share, 1 if rng.random() < 0.5 else -1
        named = min(max(right + away, 0), len(CLASSES) - 1) if wrong else right
        if wrong and named == right:
            named = right - away
        middle = min(max(1, round(CLASSES.middle(named))), most)
        return LengthEstimate(tokens=middle, allotment=min(CLASSES.edges[named], most))

    return estimate


def _measure(run: Run) -> list[Record]:
    samples = Samples(NAME, "simulator")
    shown = run.sized(ACCURACIES, (0.5, 1.0))
    run.progress.expect(len(run.seeds) * (len(_traffics()) * 2 + len(_RULES) * (len(shown) + 1)))
    for number, seed in enumerate(run.seeds):
        for traffic in _traffics():
            for label, buckets in _schemes(traffic).items():
                found = _judge(traffic, buckets, run.sized(4000, 800), seed)
                samples.add(Point(f"{traffic.name}, {label}"), **found)
                run.progress.done(f"{NAME} {traffic.name}, {label}")
        for rule in rotated(tuple(_RULES), number):
            _admit(run, samples, rule, shown, seed)
    return samples.records()


def _traffics() -> list[Traffic]:
    return [*(of_topics(Topics(predictability=share)) for share in _SHARES), of_demo()]


def _schemes(traffic: Traffic) -> dict[str, Buckets]:
    return {
        "geometric": Buckets.geometric(traffic.longest),
        "ten equal": Buckets.equal_width(traffic.longest),
    }


def _judge(traffic: Traffic, buckets: Buckets, count: int, seed: int) -> dict[str, float]:
    """Prequential: each request is predicted before its length is learnt. The first quarter is
    only learnt from."""
    predictor = LengthPredictor(PredictorSettings(buckets, warm_up=count // 4))
    jobs = traffic.jobs(offline, count, seed)
    errors: list[float] = []
    spent = 0.0
    for start in range(0, count, _BEHIND):
        group = jobs[start : start + _BEHIND]
        started = time.thread_time()
        predictions = [predictor.predict(_ids(job), job.max_tokens) for job in group]
        for prediction, job in zip(predictions, group, strict=True):
            if job.output_tokens < job.max_tokens:
                predictor.learn(prediction, job.output_tokens)
            else:
                predictor.learn_cut(prediction, job.output_tokens)
        spent += time.thread_time() - started
        errors += [
            math.log(p.guess.tokens / job.output_tokens)
            for p, job in zip(predictions, group, strict=True)
            if p.ripe
        ]
    report = predictor.report()
    assert report is not None
    return {
        "accuracy": report.accuracy,
        "majority_accuracy": report.majority_accuracy,
        "error_tokens": report.error_tokens,
        "majority_error_tokens": report.majority_error_tokens,
        "calibration_error": report.calibration_error,
        "exceeded": report.exceeded,
        "sigma": float(np.std(errors)),
        "s_per_request": spent / count,
    }


def _ids(job: Job) -> Sequence[int]:
    assert job.prompt_ids is not None
    return job.prompt_ids


def _admit(run: Run, samples: Samples, rule: str, shown: Sequence[float], seed: int) -> None:
    """Throughput of a backlog at each accuracy, over that with true lengths known."""
    count = run.sized(400, 120)
    truth = serve(run, Way("oracle", _RULES[rule], by(oracle)), offline, count, seed)
    run.progress.done(f"{NAME} {rule}, oracle")
    for accuracy in shown:
        way = Way(f"{rule}, {accuracy}", _RULES[rule], by(accurate(accuracy)))
        outcome = serve(run, way, offline, count, seed)
        point = Point(rule, axis="accuracy", at=accuracy)
        samples.add(
            point,
            tokens_per_s=outcome.throughput(),
            of_oracle=outcome.throughput() / truth.throughput(),
            penalty=_penalty(outcome, truth),
            preemptions=outcome.tally.preemptions,
        )
        run.progress.done(f"{NAME} {rule}, accuracy {accuracy:g}")


def _penalty(outcome: Outcome, truth: Outcome) -> float:
    """Share of the time that passes took which true lengths would have saved."""
    return 1 - truth.busy_seconds / outcome.busy_seconds


def _tables(results: Results) -> list[Table]:
    mine = results.where(experiment=NAME)
    shown = (
        ("accuracy", "{:.1%}"),
        ("majority_accuracy", "{:.1%}"),
        ("calibration_error", "{:.3f}"),
        ("error_tokens", "{:.0f}"),
        ("majority_error_tokens", "{:.0f}"),
        ("sigma", "{:.2f}"),
        ("exceeded", "{:.1%}"),
        ("s_per_request", "{:.2g}"),
    )
    rows = []
    for policy in mine.where(metric="sigma").distinct("policy"):
        found = {r.metric: r.value for r in mine.where(policy=str(policy))}
        rows.append((str(policy), *(form.format(found[name]) for name, form in shown)))
    header = (
        *(
            "traffic and classes",
            "accuracy",
            "majority's",
            "calibration error",
            "mean error, tokens",
        ),
        *("of the mean", "sigma", "over allotment", "s per request"),
    )
    tables = [Table("Predictions, each made before its length was known", header, tuple(rows))]
    lines = []
    for rule in _RULES:
        for metric, title in (("of_oracle", "throughput / oracle's"), ("penalty", "penalty")):
            found_at = list(mine.where(policy=rule, metric=metric))
            if found_at:
                lines.append((f"{rule}, {title}", *(f"{r.value:.3f}" for r in found_at)))
                head = ("accuracy of ten classes", *(f"{r.at:g}" for r in found_at))
    if lines:
        tables.append(Table("What accuracy is worth to admission", head, tuple(lines)))
    return tables if rows else []


def _bars(results: Results) -> list[Bar]:
    mine = results.where(experiment=NAME)
    bars = []
    times = [r.value for r in mine.where(metric="s_per_request")]
    if times:
        claim = "B9 seconds of processor time per request, to predict and to learn"
        bars.append(Bar(claim, "simulator", max(times), 0.001, False))
    for share in _SHARES[1:]:
        name = f"{of_topics(Topics(predictability=share)).name}, geometric"
        ours = mine.value(policy=name, metric="accuracy")
        majority = mine.value(policy=name, metric="majority_accuracy")
        if ours is not None and majority:
            claim = f"B9 accuracy over the majority class's, {name}"
            bars.append(Bar(claim, "simulator", ours / majority, 1.0, True))
    penalties = [r.value for r in mine.where(metric="penalty", policy="reserve-predicted")]
    if penalties:
        claim = "B9 penalty of mispredictions under reserve-predicted, share of time"
        bars.append(Bar(claim, "simulator", max(penalties), 0.11, False))
    return bars


def _draw(results: Results, folder: Path) -> list[Path]:
    path = folder / "b9-predictor.png"
    return plots.panels(results.where(experiment=NAME), path, 2, _draw_panels, width=5.0)


def _draw_panels(mine: Results, panels: plots.Panels) -> None:
    left, right = panels
    names = [str(p) for p in mine.where(metric="sigma").distinct("policy")]
    for place, (metric, label, shade) in enumerate(
        (
            ("accuracy", "predictor", "#1F77B4"),
            ("majority_accuracy", "majority class", "#BBBBBB"),
        )
    ):
        values = [mine.value(policy=name, metric=metric) or 0.0 for name in names]
        spots = [i + (place - 0.5) * 0.4 for i in range(len(names))]
        left.barh(spots, [100 * v for v in values], 0.4, color=shade, label=label)
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set_xlabel("right class, % of requests")
    left.legend(frameon=False, fontsize=8)
    for rule in _RULES:
        found = list(mine.where(policy=rule, metric="of_oracle"))
        if found:
            plots.line(right, [100 * (r.at or 0) for r in found], found, rule)
    right.set(xlabel="right class, % of requests", ylabel="throughput / with true lengths")
    right.legend(frameon=False, fontsize=8)


EXPERIMENTS = (
    Experiment(
        name=NAME,
        title="Length predictions, and what they are worth",
        engines=("simulator",),
        measure=_measure,
        draw=_draw,
        bars=_bars,
        tables=_tables,
    ),
)
