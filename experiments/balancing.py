"""B13: which of several replicas gets a request. Round robin (DeepSpeed-MII's balancer), fewest
outstanding requests, and predicted work with regard to free KV; in the simulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments import plots
from experiments.benches import OPT_13B_ON_A100, rotated
from experiments.collect import Point, Samples
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.records import Record, Results
from scheduling.order import make_policy
from scheduling.plan import Capacity
from scheduling.simulator.cluster import ClusterSpec, simulate_cluster
from scheduling.simulator.engine import simulate
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.traffic import Lengths, LogNormal, make_jobs, noisy, offline, poisson
from scheduling.simulator.worker import WorkerSpec

NAME = "B13"
REPLICAS = 4
_EARLY = 1 << 20  # requests that a replica takes beyond its batch: all that come
_LATE = 2
_LENGTHS = Lengths("heavy-tailed", LogNormal(161, 1.6), LogNormal(338, 1.5))
_LOADS = (0.7, 0.9)
_SCALES = (1, 2, 4, 8)
_WORKER = WorkerSpec(
    capacity=Capacity(
        blocks=1 << 12, block_size=16, max_tokens=2048, max_sequences=16, max_context=2049
    ),
    cost=OPT_13B_ON_A100,
    policy=lambda cost: make_policy("fcfs", cost=cost),
)

# Name of a policy: the router, and how many requests wait at a replica instead of in the queue.
_POLICIES = {
    "round-robin": ("round-robin", _EARLY),
    "least-outstanding": ("least-outstanding", _EARLY),
    "kv-aware": ("kv-aware", _EARLY),
    "round-robin, late": ("round-robin", _LATE),
    "kv-aware, late": ("kv-aware", _LATE),
}


def _measure(run: Run) -> list[Record]:
    samples = Samples(NAME, "simulator")
    run.progress.expect(len(run.seeds) * (len(_POLICIES) * len(_LOADS) + len(_SCALES)))
    one = run.once((NAME, "saturation"), lambda: _saturation(run.sized(1500, 300)))
    for number, seed in enumerate(run.seeds):
        for load in _LOADS:
            jobs = make_jobs(
                _LENGTHS,
                poisson(load * REPLICAS * one),
                run.sized(1600, 300),
                seed=seed,
                estimator=noisy(0.5),
            )
            for policy in rotated(tuple(_POLICIES), number):
                routing, ahead = _POLICIES[policy]
                spec = ClusterSpec(_WORKER, REPLICAS, routing=routing, ahead_sequences=ahead)
                samples.add(Point(policy, load), **_metrics(simulate_cluster(jobs, spec)))
                run.progress.done(f"{NAME} {policy} at {load:g}")
        for replicas in _SCALES:
            jobs = make_jobs(_LENGTHS, offline, replicas * run.sized(400, 60), seed=100 + seed)
            spec = ClusterSpec(_WORKER, replicas, routing="round-robin", ahead_sequences=_EARLY)
            rate = simulate_cluster(jobs, spec).completion_rate()
            samples.add(Point("round-robin", axis="replicas", at=replicas), requests_per_s=rate)
            run.progress.done(f"{NAME} {replicas} replicas")
    for load in _LOADS:
        for policy in list(_POLICIES)[1:]:
            for metric in ("p99_jct_s", "mean_jct_s", "p99_ttft_s", "s_per_token"):
                samples.compare(Point("round-robin", load), Point(policy, load), metric)
    for replicas in _SCALES[1:]:
        more = Point("round-robin", axis="replicas", at=replicas)
        samples.compare(more, Point("round-robin", axis="replicas", at=1), "requests_per_s")
    return samples.records()


def _saturation(count: int) -> float:
    """Requests per second of one replica."""
    jobs = make_jobs(_LENGTHS, offline, count, seed=10_000)
    return simulate(jobs, _WORKER).completion_rate()


def _metrics(outcome: Outcome) -> dict[str, float]:
    kept = outcome.after_warmup()
    return {
        "mean_jct_s": kept.mean_completion(),
        "p99_jct_s": kept.completion_percentile(99),
        "mean_ttft_s": float(kept.first_token().mean()),
        "p99_ttft_s": float(np.percentile(kept.first_token(), 99)),
        "s_per_token": kept.mean_normalized(),
        "tokens_per_s": outcome.throughput(),
    }


def _tables(results: Results) -> list[Table]:
    mine = results.where(experiment=NAME)
    shown = ("mean_jct_s", "p99_jct_s", "mean_ttft_s", "p99_ttft_s", "s_per_token", "tokens_per_s")
    rows = []
    for load in _LOADS:
        for policy in _POLICIES:
            values = [mine.value(policy=policy, load=load, metric=name) for name in shown]
            if None not in values:
                cells = (f"{value:.3g}" for value in values if value is not None)
                rows.append((f"{policy}, load {load:g}", *cells))
    header = ("", "mean JCT, s", "P99 JCT, s", "mean TTFT, s", "P99 TTFT, s", "s/token", "tokens/s")
    tables = [Table(f"{REPLICAS} replicas", header, tuple(rows))] if rows else []
    scaling = list(mine.where(metric="requests_per_s_ratio"))
    if scaling:
        head = ("", *(f"{r.at:g} replicas" for r in scaling))
        row = ("times one replica's", *(f"{r.value:.2f}" for r in scaling))
        tables.append(Table("Throughput of a backlog under round robin", head, (row,)))
    return tables


def _bars(results: Results) -> list[Bar]:
    bars = []
    for record in results.where(experiment=NAME, metric="requests_per_s_ratio"):
        share = record.value / (record.at or 1)
        claim = f"B13 throughput of {record.at:g} replicas over {record.at:g} times one"
        bars.append(Bar(claim, "simulator", share, 0.95, True))
    for policy in ("least-outstanding", "kv-aware"):
        pair = f"round-robin / {policy}"
        found = results.value(experiment=NAME, policy=pair, load=0.9, metric="p99_ttft_s_ratio")
        if found is not None:
            claim = f"B13 P99 TTFT of round robin over {policy}, load 0.9"
            bars.append(Bar(claim, "simulator", found, 1.1, True))
    return bars


def _draw(results: Results, folder: Path) -> list[Path]:
    path = folder / "b13-balancing.png"
    return plots.panels(results.where(experiment=NAME), path, 3, _draw_panels, width=4.2)


def _draw_panels(mine: Results, panels: plots.Panels) -> None:
    shown = (
        ("p99_ttft_s", "P99 TTFT, s"),
        ("p99_jct_s", "P99 JCT, s"),
        ("s_per_token", "s per token"),
    )
    names = [name for name in _POLICIES if len(mine.where(policy=name))]
    for panel, (metric, label) in zip(panels, shown, strict=True):
        width = 0.8 / len(names)
        for place, policy in enumerate(names):
            found = list(mine.where(policy=policy, metric=metric))
            spots = [i + (place - (len(names) - 1) / 2) * width for i in range(len(found))]
            errors = [[r.value - r.ci_low for r in found], [r.ci_high - r.value for r in found]]
            panel.bar(
                spots,
                [r.value for r in found],
                width,
                yerr=errors,
                label=policy,
                capsize=2,
                color=plots.color(policy),
                error_kw={"lw": 0.8},
            )
        panel.set_xticks(range(len(_LOADS)), [f"load {load:g}" for load in _LOADS])
        panel.set_ylabel(label)
    panels[0].legend(frameon=False, fontsize=8)


EXPERIMENTS = (
    Experiment(
        name=NAME,
        title="Which replica gets a request",
        engines=("simulator",),
        measure=_measure,
        draw=_draw,
        bars=_bars,
        tables=_tables,
    ),
)
