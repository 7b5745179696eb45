"""B3: the arrival rate that an order sustains at an objective for latency per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments import plots
from experiments.benches import bench
from experiments.compare import Trials, records, trials
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.orders import FCFS, LEARNED, ORACLE, ORDERS, PROMOTED, SKIP_JOIN, Order
from experiments.policy_reports import engines_of, with_interval
from experiments.records import Record, Results
from experiments.stats import interval, ratio

_TRANSIENT = "B3"
_STEADY = "B3-steady"
_OBJECTIVE = 0.3 / 0.02174
"""Seconds per token over those of a generation pass: FastServe's 0.3 s for OPT-13B."""

_TRANSIENT_LOADS = (0.9, 1.1, 1.4, 1.8, 2.4, 3.2, 4.5)
_STEADY_LOADS = (0.9, 0.95, 0.99)
_STEADY_SEEDS = 3  # of long runs
_RATE = "rate_at_objective_over_saturation"


# Without naive MLFQ: with these lengths it does what skip-join does (B1).
_COMPARED = {
    "real": (FCFS, SKIP_JOIN, LEARNED),
    "simulator": (FCFS, SKIP_JOIN, PROMOTED, LEARNED, ORACLE),
}


def _measure(run: Run) -> list[Record]:
    orders = tuple(order for order in ORDERS if order.label in _COMPARED[run.engine])
    loads = run.sized(_TRANSIENT_LOADS, (1.0, 2.0, 4.0))
    made = _sweep(run, _TRANSIENT, orders, 400, loads)
    if run.engine == "simulator" and not run.quick:
        few = tuple(order for order in ORDERS if order.label in _COMPARED["real"])
        some = replace(run, seeds=run.seeds[:_STEADY_SEEDS])
        made += _sweep(some, _STEADY, few, 5000, _STEADY_LOADS)
    return made


def _sweep(
    run: Run, name: str, orders: tuple[Order, ...], count: int, loads: Sequence[float]
) -> list[Record]:
    """Latency over the load, and where it crosses the objective."""
    usual = bench(run)
    sized = replace(usual, count=count)
    made: list[Record] = []
    by_load: list[Trials] = []
    for load in loads:
        found = trials(run, sized, orders, load)
        by_load.append(found)
        made += records(name, run, found, load=load, names=("s_per_token", "mean_jct_s"))
    objective = _OBJECTIVE * usual.engine.step_seconds
    crossings = {
        label: [
            _crossing(loads, [found[label][seed]["s_per_token"] for found in by_load], objective)
            for seed in range(len(run.seeds))
        ]
        for label in by_load[0]
    }
    for label, values in crossings.items():
        made.append(Record.of(name, run.engine, label, _RATE, interval(values)))
        made.append(
            Record.of(name, run.engine, label, f"{_RATE}_vs_fcfs", ratio(values, crossings[FCFS]))
        )
    return made


def _crossing(loads: Sequence[float], values: Sequence[float], objective: float) -> float:
    """The load at which the latency first exceeds the objective, between two measured ones by
    the logarithm of the latency. The last load if it never does, the first if it always does."""
    if values[0] > objective:
        return loads[0]
    for place in range(1, len(loads)):
        if values[place] > objective:
            below, above = math.log(values[place - 1]), math.log(values[place])
            share = (math.log(objective) - below) / (above - below)
            return loads[place - 1] + share * (loads[place] - loads[place - 1])
    return loads[-1]


def _tables(results: Results) -> list[Table]:
    made = []
    for name, title in ((_TRANSIENT, "400 jobs"), (_STEADY, "5,000 jobs, loads below 1")):
        found = results.where(experiment=name)
        made += [
            _table(found.where(engine=e), f"{plots.ENGINE_TITLES[e]}, {title}")
            for e in engines_of(found)
        ]
    return made


def _table(found: Results, title: str) -> Table:
    rows = []
    for policy in found.distinct("policy"):
        each = {r.metric: r for r in found.where(policy=str(policy)) if r.load is None}
        cells = (with_interval(each[_RATE]), with_interval(each[f"{_RATE}_vs_fcfs"]))
        rows.append((str(policy), *cells))
    return Table(title, ("order", "rate at the objective / saturation", "over FCFS's"), tuple(rows))


def _draw(results: Results, folder: Path) -> list[Path]:
    panels = [
        (name, title, engine)
        for name, title in ((_TRANSIENT, "400 jobs"), (_STEADY, "5,000 jobs"))
        for engine in engines_of(results.where(experiment=name))
    ]
    if not panels:
        return []
    made, axes = plots.figure(len(panels))
    for panel, (name, title, engine) in zip(axes[0], panels, strict=True):
        found = results.where(experiment=name, engine=engine, metric="s_per_token")
        for policy in found.distinct("policy"):
            points = list(found.where(policy=str(policy)))
            plots.line(panel, [p.load or 0.0 for p in points], points, str(policy))
        plots.log_scale(panel)
        panel.set_xlabel("load (arrivals over saturation rate)")
        panel.set_ylabel("latency per output token, s")
        plots.title(panel, f"{plots.ENGINE_TITLES[engine]}, {title}")
    plots.legend_below(made, axes[0][0])
    return [plots.save(made, folder / "b3-rate.png")]


def _bars(results: Results) -> list[Bar]:
    found = results.where(experiment=_TRANSIENT, policy=SKIP_JOIN, metric=f"{_RATE}_vs_fcfs")
    claim = "400 jobs: rate at the objective, skip-join over FCFS"
    return [Bar(claim, r.engine, r.value, 1.6, True) for r in found]


EXPERIMENTS = (
    Experiment(
        "B3",
        "Rate at the objective",
        ("real", "simulator"),
        measure=_measure,
        draw=_draw,
        bars=_bars,
        tables=_tables,
    ),
)
