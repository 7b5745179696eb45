from dataclasses import replace
from pathlib import Path

import pytest

from experiments.bars import load_bars
from experiments.benches import bench
from experiments.experiment import Run
from experiments.orders import FCFS, LEARNED, MLFQ, ORACLE, SKIP_JOIN
from experiments.records import EngineName, Record, Results
from experiments.registry import experiment
from experiments.stats import interval

LOAD = 0.9


@pytest.fixture(scope="module")
def results() -> Results:
    """B1, B2, B4, B5, B6, DEMO and FRONTIER in the simulator, with far too few jobs."""
    run = Run("simulator", (0,), quick=True)
    run.shared["bench"] = replace(bench(run), count=30, backlog=40)
    found = Results()
    for name in ("B1", "B2", "B4", "B6", "DEMO", "FRONTIER"):
        found.add(experiment(name).measure(run))
    return found


def test_every_order_has_every_metric_at_every_load(results: Results) -> None:
    found = results.where(experiment="B1")
    labels = found.where(metric="mean_jct_s").distinct("policy")
    assert {FCFS, MLFQ, SKIP_JOIN, LEARNED, ORACLE} <= set(labels)
    for label in labels:
        each = found.where(policy=str(label), load=LOAD)
        assert {"mean_jct_s", "p99_jct_s", "s_per_token", "mean_ttft_s", "p99_ttft_s"} <= set(
            each.distinct("metric")
        )


@pytest.mark.parametrize("name", ["B1", "B2", "B4", "B6", "DEMO", "FRONTIER"])
def test_every_experiment_draws_and_tabulates(name: str, results: Results, tmp_path: Path) -> None:
    made = experiment(name)
    tables = made.tables(results)
    assert tables
    assert all(len(row) == len(table.header) for table in tables for row in table.rows)
    for path in made.draw(results, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def told(policy: str, metric: str, value: float, engine: EngineName = "simulator") -> Record:
    return Record.of("B1", engine, policy, metric, interval([value]), load=LOAD)


def test_bars_are_read_from_the_records() -> None:
    found = Results(
        [
            told(SKIP_JOIN, "s_per_token_vs_fcfs", 0.5),
            told(SKIP_JOIN, "mean_jct_s_vs_fcfs", 1.25),
            told(SKIP_JOIN, "p99_jct_s", 100.0),
            told(LEARNED, "p99_jct_s", 60.0),
        ]
    )
    bars = {bar.claim: bar for bar in load_bars(found)}
    met = bars["load 0.9: per-token latency, FCFS over skip-join"]
    assert (met.value, met.met) == (2.0, True)
    missed = bars["load 0.9: mean JCT, FCFS over skip-join"]
    assert (missed.value, missed.met) == (0.8, False)
    tail = bars["load 0.9: predicted-srpt, P99 JCT over skip-join's"]
    assert (tail.value, tail.met) == (0.6, False)
    assert len(bars) == 3
