"""B1, B2, B4 and B6: the orders against each other and against the oracle, over the load."""

from __future__ import annotations

from experiments import policy_reports as reports
from experiments.bars import load_bars, optimality_bars, peak_bars
from experiments.benches import bench
from experiments.compare import records, trials
from experiments.experiment import Experiment, Run
from experiments.orders import ORDERS
from experiments.records import Record

LOADS = (0.5, 0.7, 0.9)
OVERLOAD = 1.2


def _at(experiment: str, run: Run, loads: tuple[float, ...], *names: str) -> list[Record]:
    made: list[Record] = []
    for load in loads:
        found = trials(run, bench(run), ORDERS, load)
        made += records(experiment, run, found, load=load, names=names or None)
    return made


EXPERIMENTS = (
    Experiment(
        "B1",
        "Orders below saturation",
        ("real", "simulator"),
        measure=lambda run: _at("B1", run, LOADS),
        draw=reports.draw_loads,
        bars=load_bars,
        tables=reports.load_tables("B1"),
    ),
    Experiment(
        "B2",
        "Orders in overload",
        ("real", "simulator"),
        measure=lambda run: _at("B2", run, (OVERLOAD,)),
        draw=reports.draw_overload,
        tables=reports.load_tables("B2"),
    ),
    Experiment(
        "B4",
        "How far from the oracle",
        ("real", "simulator"),
        measure=lambda run: _at("B4", run, (*LOADS, OVERLOAD), "mean_jct_s", "p99_jct_s"),
        draw=reports.draw_optimality,
        bars=optimality_bars,
        tables=reports.ratio_tables("B4", "mean_jct_s_vs_oracle", "Mean JCT over the oracle's"),
    ),
    Experiment(
        "B6",
        "Peak KV",
        ("real", "simulator"),
        measure=lambda run: _at("B6", run, (*LOADS, OVERLOAD), "peak_kv_tokens"),
        draw=reports.draw_peaks,
        bars=peak_bars,
        tables=reports.ratio_tables("B6", "peak_kv_tokens_vs_fcfs", "Peak KV over FCFS's"),
    ),
)
