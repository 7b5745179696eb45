"""B8: how much KV has to be free before a request is let in. Its longest output (Orca), its
predicted one (S3), the predicted peak of all together, or only what it needs now (paged)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from experiments import plots
from experiments.benches import rotated
from experiments.collect import Point, Samples
from experiments.engines import Setup, SimulatedEngine
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.records import Record, Results
from scheduling.length import LengthPredictor, PredictorSettings
from scheduling.length_buckets import Buckets
from scheduling.order import make_policy
from scheduling.rules import Rules
from scheduling.simulator.hardware import GPUS, ModelShape
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.profiles import Profile, of_hardware
from scheduling.simulator.topics import Topics, with_learned_estimates
from scheduling.simulator.traffic import (
    Arrivals,
    Estimator,
    Job,
    noisy,
    offline,
    oracle,
    poisson,
    unpredicted,
)

NAME = "B8"
SLO_S_PER_TOKEN = 0.1875
"""S3's: the reading speed of four words a second."""

GPT_NEOX_20B = ModelShape("gpt-neox-20b", 44, 6144, 24576, 64, 64, 96, 50432, 2048, gated=False)
"""One of S3's models; on one A100-80, as there, its weights leave KV for 32 thousand tokens."""

TOPICS = Topics(predictability=0.7)
"""ShareGPT-like lengths, of which the prompt's topic explains 70% of the variance of the logarithm:
who knows the topic is wrong by sigma 0.49."""

_WARM = 2000  # requests that the predictor has learnt from before
_BEHIND = 64  # requests in flight: predicted, and not yet learnt from
ONLINE_LOADS = (0.5, 0.7, 0.9, 1.1)
"""Arrival rate over the saturation rate of "reserve-predicted"."""

Estimated = Callable[[Sequence[Job], int], list[Job]]
"""(jobs, seed) to the same jobs with what is predicted of them."""


def by(estimator: Estimator) -> Estimated:
    """Each job by itself, from its true length."""

    def estimated(jobs: Sequence[Job], seed: int) -> list[Job]:
        rng = np.random.default_rng((seed, 99))
        return [
            replace(job, estimate=estimator(rng, job.output_tokens, job.max_tokens)) for job in jobs
        ]

    return estimated


def learned(jobs: Sequence[Job], seed: int) -> list[Job]:
    """By the predictor that gateways run, after `_WARM` earlier requests of the same kind."""
    buckets = Buckets.geometric(TOPICS.lengths.max_total)
    predictor = LengthPredictor(PredictorSettings(buckets))
    with_learned_estimates(TOPICS.jobs(offline, _WARM, seed=50_000 + seed), predictor)
    return with_learned_estimates(jobs, predictor, behind=_BEHIND)


@dataclass(frozen=True, slots=True)
class Way:
    """An admission rule with the predictions it goes by."""

    label: str
    rules: Rules
    estimated: Estimated


_MAX, _PAGED = Rules(admission="reserve-max"), Rules(admission="paged")
_SUM, _PEAK = Rules(admission="reserve-sum"), Rules(admission="reserve-predicted")

WAYS = (
    Way("reserve-max", _MAX, by(unpredicted)),
    Way("reserve-sum", _SUM, learned),
    Way("reserve-sum, oracle", _SUM, by(oracle)),
    Way("reserve-predicted", _PEAK, learned),
    Way("reserve-predicted, sigma 0.5", _PEAK, by(noisy(0.5, margin=1.0))),
    Way("reserve-predicted, sigma 1", _PEAK, by(noisy(1.0, margin=1.0))),
    Way("reserve-predicted, oracle", _PEAK, by(oracle)),
    Way("paged", _PAGED, by(unpredicted)),
)
_REFERENCE = "reserve-predicted"
_ONLINE = ("reserve-max", "reserve-sum", _REFERENCE, "paged")


@lru_cache(maxsize=1)
def machine() -> Profile:
    """GPT-NeoX-20B on one A100-80, by the roofline."""
    return of_hardware(GPT_NEOX_20B, GPUS["a100-80"])


def _engine() -> SimulatedEngine:
    return SimulatedEngine(machine().cost, machine().capacity(max_tokens=1024, max_sequences=256))


def serve(run: Run, way: Way, arrivals: Arrivals, count: int, seed: int) -> Outcome:
    """One run. The predictions of a seed are the same at all rates, and made once."""
    key = (NAME, way.estimated, count, seed)
    known = run.once(key, lambda: way.estimated(TOPICS.jobs(offline, count, seed=seed), seed))
    jobs = [
        replace(job, estimate=other.estimate)
        for job, other in zip(TOPICS.jobs(arrivals, count, seed=seed), known, strict=True)
    ]
    engine = SimulatedEngine(machine().cost, machine().capacity(max_tokens=1024, max_sequences=256))
    return engine.serve(jobs, Setup(lambda cost: make_policy("fcfs", cost=cost), way.rules))


def _measure(run: Run) -> list[Record]:
    samples = Samples(NAME, "simulator")
    run.progress.expect(len(run.seeds) * (len(WAYS) + len(_ONLINE) * len(ONLINE_LOADS)))
    for number, seed in enumerate(run.seeds):
        for way in rotated(WAYS, number):
            outcome = serve(run, way, offline, run.sized(800, 200), seed)
            samples.add(Point(way.label), **_offline(outcome))
            run.progress.done(f"{NAME} offline, {way.label}")
    rate = samples.values(Point(_REFERENCE), "requests_per_s")
    for number, seed in enumerate(run.seeds):
        for load in ONLINE_LOADS:
            arrivals = poisson(load * sum(rate) / len(rate))
            for way in rotated([w for w in WAYS if w.label in _ONLINE], number):
                outcome = serve(run, way, arrivals, run.sized(800, 150), seed)
                samples.add(Point(way.label, load), **_online(outcome))
                run.progress.done(f"{NAME} load {load:g}, {way.label}")
    for under in ("reserve-max", "reserve-sum", "reserve-predicted, oracle", "paged"):
        for metric in ("tokens_per_s", "requests_per_s"):
            samples.compare(Point(_REFERENCE), Point(under), metric)
    return samples.records()


def _offline(outcome: Outcome) -> dict[str, float]:
    """`requests_per_s` leaves out how the run begins and ends, `tokens_per_s` does not."""
    return {
        "tokens_per_s": outcome.throughput(),
        "requests_per_s": outcome.completion_rate(),
        "preemptions": outcome.tally.preemptions,
        "mispredictions": outcome.tally.mispredictions,
        "peak_kv_tokens": outcome.peak_kv_tokens,
    }


def _online(outcome: Outcome) -> dict[str, float]:
    last_arrival = max(served.job.arrived_at for served in outcome.served)
    rate = len(outcome.served) / last_arrival
    kept = outcome.after_warmup()
    within = float((kept.normalized() <= SLO_S_PER_TOKEN).mean())
    return {
        "s_per_token": kept.mean_normalized(),
        "mean_jct_s": kept.mean_completion(),
        "within_slo": within,
        "goodput_per_s": within * rate,
        "preemptions": outcome.tally.preemptions,
    }


def _tables(results: Results) -> list[Table]:
    mine = results.where(experiment=NAME)
    shown = ("tokens_per_s", "requests_per_s", "preemptions", "mispredictions", "peak_kv_tokens")
    rows, online = [], []
    for way in WAYS:
        each = list(mine.where(policy=way.label))
        found = {r.metric: r.value for r in each if r.load is None}
        if all(name in found for name in shown):
            rows.append((way.label, *(f"{found[name]:,.4g}" for name in shown)))
        goods = [r.value for r in each if r.metric == "goodput_per_s"]
        if goods:
            online.append((way.label, *(f"{value:.2f}" for value in goods)))
    tables = []
    if rows:
        header = (
            "offline",
            "tokens/s",
            "requests/s",
            "preempted",
            "mispredicted",
            "peak KV tokens",
        )
        tables.append(Table("Throughput of a backlog", header, tuple(rows)))
    if online:
        head = ("", *(f"load {load:g}" for load in ONLINE_LOADS))
        title = f"Requests per second that meet {SLO_S_PER_TOKEN} s per token"
        tables.append(Table(title, head, tuple(online)))
    return tables


def _bars(results: Results) -> list[Bar]:
    bars = []
    for under, limit, name in (
        ("reserve-max", 2.0, "reserve-max"),
        ("reserve-predicted, oracle", 0.9, "the oracle"),
        ("paged", 0.95, "paged"),
    ):
        pair = f"{_REFERENCE} / {under}"
        value = results.value(experiment=NAME, policy=pair, metric="tokens_per_s_ratio")
        if value is not None:
            claim = f"B8 offline throughput of reserve-predicted over {name}"
            bars.append(Bar(claim, "simulator", value, limit, True))
    return bars


def _draw(results: Results, folder: Path) -> list[Path]:
    path = folder / "b8-admission.png"
    return plots.panels(results.where(experiment=NAME), path, 2, _draw_panels, width=5.2)


def _draw_panels(mine: Results, panels: plots.Panels) -> None:
    left, right = panels
    found = [r for way in WAYS for r in mine.where(policy=way.label, metric="tokens_per_s")]
    errors = [[r.value - r.ci_low for r in found], [r.ci_high - r.value for r in found]]
    left.barh(
        range(len(found)),
        [r.value for r in found],
        xerr=errors,
        color=[plots.color(r.policy) for r in found],
        error_kw={"lw": 0.8, "capsize": 2},
    )
    left.set_yticks(range(len(found)), [r.policy for r in found])
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set_xlabel("tokens per second, backlog of all requests")
    for label in _ONLINE:
        line = list(mine.where(policy=label, metric="goodput_per_s"))
        if line:
            plots.line(right, [r.load or 0 for r in line], line, label)
    right.set(xlabel="load", ylabel=f"requests/s within {SLO_S_PER_TOKEN} s per token")
    right.set_ylim(0, None)
    right.legend(frameon=False, fontsize=8)


EXPERIMENTS = (
    Experiment(
        name=NAME,
        title="KV admission by prediction",
        engines=("simulator",),
        measure=_measure,
        draw=_draw,
        bars=_bars,
        tables=_tables,
    ),
)
