"""FAIR: one tenant floods a cluster with a multiple of its share. What the others notice of it, and
what they would if all requests were one tenant's; in the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments import plots
from experiments.benches import OPT_13B_ON_A100, rotated
from experiments.collect import Point, Samples
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.policy_reports import with_interval
from experiments.records import Record, Results
from scheduling.order import make_policy
from scheduling.plan import Capacity
from scheduling.simulator.cluster import ClusterSpec, simulate_cluster
from scheduling.simulator.outcome import Served
from scheduling.simulator.queue import QueueOrder
from scheduling.simulator.traffic import SHAREGPT, Job, make_jobs, noisy, offline, poisson
from scheduling.simulator.worker import WorkerSpec

NAME = "FAIR"
TENANTS = 4
USUAL = 0.7
"""Of its share, what every tenant asks for while none floods."""

FLOODS = (2.0, 5.0, 10.0)
"""Times its share, what the flooding tenant asks for."""

_POLICIES = ("predicted-srpt", "skip-join-mlfq")
_WORKERS = 2
_BATCH = 16
_FLOODING = 0
_AXIS = "flood"
_ONE = ", one tenant"
_NONE_AHEAD = ", none ahead"
_METRICS = (("p95_ttft_s", "P95 TTFT"), ("mean_jct_s", "mean JCT"))
_LIMIT = 2.0  # times what it is without the flood


def _spec(policy: str, ahead: int = _BATCH) -> ClusterSpec:
    """Workers hold `ahead` sequences beyond their batch: by default as many as `decode_ahead` says
    under policies that preempt."""
    capacity = Capacity(
        blocks=1 << 13, block_size=16, max_tokens=2048, max_sequences=_BATCH, max_context=2049
    )
    worker = WorkerSpec(capacity, OPT_13B_ON_A100, lambda cost: make_policy(policy, cost=cost))
    return ClusterSpec(worker, _WORKERS, queue=QueueOrder(policy), ahead_sequences=ahead)


def _measure(run: Run) -> list[Record]:
    samples = Samples(NAME, "simulator")
    rates = (USUAL, *FLOODS)
    specs = {
        made: spec
        for policy in _POLICIES
        for made, spec in (
            (policy, _spec(policy)),
            (policy + _ONE, _spec(policy)),
            (policy + _NONE_AHEAD, _spec(policy, ahead=0)),
        )
    }
    run.progress.expect(len(run.seeds) * len(specs) * len(rates))
    share = run.once((NAME, "share"), lambda: _saturation(run.sized(3000, 200)) / TENANTS)
    seconds = run.sized(400, 25) / share
    for number, seed in enumerate(run.seeds):
        for at in rates:
            jobs = _traffic(at * share, USUAL * share, seconds, seed)
            as_one = [replace(job, tenant="") for job in jobs]
            for policy in rotated(tuple(specs), number):
                arriving = as_one if policy.endswith(_ONE) else jobs
                served = simulate_cluster(arriving, specs[policy]).served
                samples.add(_point(policy, at), **_metrics(served, seconds))
                run.progress.done(f"{NAME} {policy}, {at:g} times its share")
    for policy in _POLICIES:
        for at in FLOODS:
            for metric, _ in _METRICS:
                samples.compare(_point(policy, at), _point(policy, USUAL), metric)
                samples.compare(_point(policy + _ONE, at), _point(policy, at), metric)
    return samples.records()


def _point(policy: str, at: float) -> Point:
    return Point(policy, axis=_AXIS, at=at)


def _saturation(count: int) -> float:
    """Requests per second of the whole cluster."""
    jobs = make_jobs(SHAREGPT, offline, count, seed=10_000, estimator=noisy(0.5))
    return simulate_cluster(jobs, _spec("fcfs")).completion_rate()


def _traffic(flood: float, usual: float, seconds: float, seed: int) -> list[Job]:
    """What arrives in that time. The requests of the calm are the same at every `flood`."""
    jobs: list[Job] = []
    for tenant in range(TENANTS):
        rate = flood if tenant == _FLOODING else usual
        drawn = make_jobs(
            SHAREGPT,
            poisson(rate),
            round(rate * seconds),
            seed=TENANTS * seed + tenant,
            estimator=noisy(0.5),
            tenants=(f"tenant-{tenant}",),
        )
        jobs += [replace(job, id=f"{tenant}-{job.id}") for job in drawn]
    return jobs


def _metrics(served: Sequence[Served], seconds: float) -> dict[str, float]:
    """Of the calm tenants' requests after the first tenth of the time, and how much of the output
    until the flood ended was the flooding tenant's."""
    calm = [s for s in served if not _floods(s.job) and s.job.arrived_at > seconds / 10]
    by_then = [s for s in served if s.finished_at <= seconds]
    tokens = sum(s.job.output_tokens for s in by_then)
    flooding = sum(s.job.output_tokens for s in by_then if _floods(s.job))
    return {
        "p95_ttft_s": float(np.percentile([s.to_first_token for s in calm], 95)),
        "mean_jct_s": float(np.mean([s.completion for s in calm])),
        "flooding_share": flooding / tokens if tokens else 0.0,
    }


def _floods(job: Job) -> bool:
    return job.id.startswith(f"{_FLOODING}-")


def _tables(results: Results) -> list[Table]:
    mine = results.where(experiment=NAME)
    shown = (
        ("p95_ttft_s", "P95 TTFT of the calm tenants, s"),
        ("mean_jct_s", "Mean JCT of the calm tenants, s"),
        ("flooding_share", "Share of the output tokens that the flooding tenant gets"),
    )
    return [
        Table(title, ("order", *_columns(found)), _rows(found))
        for metric, title in shown
        if len(found := mine.where(metric=metric))
    ]


def _columns(found: Results) -> tuple[str, ...]:
    rates = sorted({r.at for r in found if r.at is not None})
    return tuple("no flood" if at == USUAL else f"{at:g} times its share" for at in rates)


def _rows(found: Results) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (str(policy), *(with_interval(r) for r in _by_rate(found.where(policy=str(policy)))))
        for policy in found.distinct("policy")
    )


def _by_rate(found: Results) -> list[Record]:
    return sorted(found, key=lambda r: r.at or 0.0)


def _bars(results: Results) -> list[Bar]:
    bars = []
    for policy in _POLICIES:
        found = results.value(
            experiment=NAME, policy=f"{policy} / {policy}", metric="p95_ttft_s_ratio", at=5.0
        )
        if found is not None:
            claim = f"FAIR {policy}: calm tenants' P95 TTFT, a flood of 5 times its share over none"
            bars.append(Bar(claim, "simulator", found, _LIMIT, False))
    return bars


def _draw(results: Results, folder: Path) -> list[Path]:
    path = folder / "fair-flood.png"
    return plots.panels_by_engine(results.where(experiment=NAME), path, 2, _draw_panels)


def _drawable(record: Record) -> Record:
    """Its band ends below the axes where it would end below 0, which has no logarithm."""
    return replace(record, ci_low=max(record.ci_low, record.value / 100))


def _draw_panels(mine: Results, title: str, panels: plots.Panels) -> None:
    for panel, (metric, name) in zip(panels, _METRICS, strict=True):
        found = mine.where(metric=metric)
        for policy in found.distinct("policy"):
            points = [_drawable(r) for r in _by_rate(found.where(policy=str(policy)))]
            plots.line(panel, [p.at or 0.0 for p in points], points, str(policy))
        plots.log_scale(panel)
        panel.set_xlabel("what the flooding tenant asks for, times its share")
        panel.set_ylabel(f"{name} of the calm tenants, s")
        plots.title(panel, title)


EXPERIMENTS = (
    Experiment(
        name=NAME,
        title="One tenant floods",
        engines=("simulator",),
        measure=_measure,
        draw=_draw,
        bars=_bars,
        tables=_tables,
    ),
)
