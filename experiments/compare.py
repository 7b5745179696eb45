"""Orders against each other on the same jobs: trials, their metrics, and the records of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.benches import Bench, rotated, saturation
from experiments.engines import Setup
from experiments.experiment import Run
from experiments.orders import FCFS, ORACLE, Order
from experiments.records import Record
from experiments.stats import interval, ratio
from experiments.traffic import Traffic
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.traffic import gamma

Metrics = dict[str, float]
Trials = dict[str, list[Metrics]]
"""By order, one entry per seed."""


def metrics(outcome: Outcome) -> Metrics:
    """What one run gave, its first tenth of jobs left out of the figures per job."""
    counted = outcome.after_warmup()
    ttft = counted.first_token()
    return {
        "mean_jct_s": counted.mean_completion(),
        "p99_jct_s": counted.completion_percentile(99),
        "s_per_token": counted.mean_normalized(),
        "mean_ttft_s": float(ttft.mean()),
        "p99_ttft_s": float(np.percentile(ttft, 99)),
        "peak_kv_tokens": float(outcome.peak_kv_tokens),
        "makespan_s": outcome.makespan,
    }


def trials(
    run: Run,
    bench: Bench,
    orders: Sequence[Order],
    load: float,
    *,
    traffic: Traffic | None = None,
    cv: float = 1.0,
) -> Trials:
    """Each order once per seed at `load` times the saturation rate, all of a seed on the same
    jobs, and each seed beginning with another order: what disturbs a machine for a while then
    disturbs different orders. An order is measured once per run at the same load and traffic.
    `cv` is that of the time between arrivals: Poisson at 1, in bursts above."""
    drawn = traffic or bench.traffic
    kept = run.once(("trials", drawn.name, load, cv, bench.count), dict[str, list[Metrics]])
    missing = [order for order in orders if order.label not in kept]
    if missing:
        kept |= _measure(run, bench, missing, load, cv, drawn)
    return {order.label: kept[order.label] for order in orders}


def _measure(
    run: Run, bench: Bench, orders: Sequence[Order], load: float, cv: float, traffic: Traffic
) -> Trials:
    run.progress.expect(len(orders) * len(run.seeds))
    found: Trials = {order.label: [] for order in orders}
    for number, seed in enumerate(run.seeds):
        rate = load * saturation(run, bench, traffic, seed)
        jobs = traffic.jobs(gamma(rate, cv), bench.count, seed)
        for order in rotated(orders, number):
            source = order.feed(run, traffic, jobs, seed)
            outcome = bench.engine.serve(source, Setup(order.policy(bench)))
            found[order.label].append(metrics(outcome))
            run.progress.done(f"{traffic.name}, load {load:g}, seed {seed}: {order.label}")
    return found


def records(
    experiment: str,
    run: Run,
    found: Trials,
    *,
    load: float | None = None,
    axis: str = "",
    at: float | None = None,
    names: Sequence[str] | None = None,
) -> list[Record]:
    """A record per order and metric, and per metric one of its ratio to first come first served
    (`mean_jct_s_vs_fcfs`) and to the oracle (`..._vs_oracle`), where those ran. Only the metrics
    in `names`, if given."""
    made = []
    for label, each in found.items():
        for name in names or each[0]:
            values = [m[name] for m in each]
            estimates = {name: interval(values)}
            for reference, suffix in ((FCFS, "vs_fcfs"), (ORACLE, "vs_oracle")):
                if reference in found:
                    below = [m[name] for m in found[reference]]
                    estimates[f"{name}_{suffix}"] = ratio(values, below)
            made += [
                Record.of(experiment, run.engine, label, metric, value, load=load, axis=axis, at=at)
                for metric, value in estimates.items()
            ]
    return made
