"""B1, B2, B4, B6, BURSTS and DEMO: orders against each other and the oracle, over the load."""

from __future__ import annotations

from dataclasses import replace

from experiments import policy_reports as reports
from experiments.bars import load_bars, optimality_bars, peak_bars
from experiments.benches import bench
from experiments.compare import records, trials
from experiments.experiment import Bars, Draw, Experiment, Measure, Run, no_bars
from experiments.learning import warm
from experiments.orders import LEARNED, NOISY, ORDERS
from experiments.records import Record
from experiments.stats import interval
from experiments.traffic import of_demo

LOADS = (0.5, 0.7, 0.9, 0.95)
OVERLOAD = 1.2
BURST_CV = 3.0
_DEMO_LOADS = (0.5, 0.9)
_DEMO_JOBS = 3  # times as many as elsewhere, as they are short


def _at(experiment: str, run: Run, loads: tuple[float, ...], *names: str) -> list[Record]:
    made: list[Record] = []
    for load in loads:
        orders = ORDERS if run.engine == "real" else (*ORDERS, *NOISY)
        found = trials(run, bench(run), orders, load)
        made += records(experiment, run, found, load=load, names=names or None)
    return made


def _loads(run: Run) -> tuple[float, ...]:
    return run.sized(LOADS, (0.5, 0.9))


def _load_records(run: Run) -> list[Record]:
    """B1, and how good the learned predictions are."""
    quality = warm(run, bench(run).traffic)
    told = Record.of("B1", run.engine, LEARNED, "predictor_sigma", interval([quality.sigma]))
    return [*_at("B1", run, _loads(run)), told]


def _overload(run: Run) -> list[Record]:
    return _at("B2", run, (OVERLOAD,))


def _demo(run: Run) -> list[Record]:
    usual, traffic, made = bench(run), of_demo(), []
    longer = replace(usual, count=_DEMO_JOBS * usual.count)
    for load in _DEMO_LOADS:
        found = trials(run, longer, ORDERS, load, traffic=traffic)
        made += records("DEMO", run, found, load=load)
    return made


def _bursts(run: Run) -> list[Record]:
    made: list[Record] = []
    for load in run.sized((0.5, 0.7, 0.9), (0.9,)):
        found = trials(run, bench(run), ORDERS, load, cv=BURST_CV)
        made += records("BURSTS", run, found, load=load)
    return made


def _per_load(
    name: str, title: str, measure: Measure, draw: Draw, bars: Bars = no_bars
) -> Experiment:
    """Its tables have all metrics of a load."""
    tables = reports.load_tables(name)
    return Experiment(name, title, ("real", "simulator"), measure, draw, bars, tables)


EXPERIMENTS = (
    _per_load("B1", "Orders below saturation", _load_records, reports.draw_loads, load_bars),
    _per_load("B2", "Orders in overload", _overload, reports.draw_overload),
    Experiment(
        "B4",
        "How far from the oracle",
        ("real", "simulator"),
        measure=lambda run: _at("B4", run, (*_loads(run), OVERLOAD), "mean_jct_s", "p99_jct_s"),
        draw=reports.draw_optimality,
        bars=optimality_bars,
        tables=reports.ratio_tables("B4", "mean_jct_s_vs_oracle", "Mean JCT over the oracle's"),
    ),
    Experiment(
        "B6",
        "Peak KV",
        ("real", "simulator"),
        measure=lambda run: _at("B6", run, (*_loads(run), OVERLOAD), "peak_kv_tokens"),
        draw=reports.draw_peaks,
        bars=peak_bars,
        tables=reports.ratio_tables("B6", "peak_kv_tokens_vs_fcfs", "Peak KV over FCFS's"),
    ),
    _per_load("BURSTS", "Orders when requests come in bursts", _bursts, reports.draw_bursts),
    _per_load("DEMO", "Orders on the demo model's own lengths", _demo, reports.draw_demo),
)
