"""B5: skip-join against naive MLFQ and first come, first served, as prompts get longer beside
their outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from experiments import plots
from experiments.benches import Bench, bench
from experiments.compare import records, trials
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.orders import FCFS, MLFQ, SKIP_JOIN, UNPREDICTED
from experiments.policy_reports import engines_of, with_interval
from experiments.records import Record, Results
from experiments.stats import ratio
from experiments.traffic import of_lengths
from scheduling.simulator.traffic import in_out_ratio

_RATIOS = (0.25, 1.0, 4.0, 16.0, 64.0, 256.0)
_QUICK = (1.0, 64.0)
_LOAD = 0.9
_ORDERS = tuple(order for order in UNPREDICTED if order.label in (FCFS, MLFQ, SKIP_JOIN))
_GAIN = "s_per_token_mlfq_over_skip_join"


def _measure(run: Run) -> list[Record]:
    usual = bench(run)
    # Longer than B1's on the real engine: there a short prompt costs less than a pass.
    total = 512 if run.engine == "simulator" else 192
    made: list[Record] = []
    for each in run.sized(_RATIOS, _QUICK):
        traffic = of_lengths(in_out_ratio(each, total=total))
        found = trials(run, _sized(run, usual, each), _ORDERS, _LOAD, traffic=traffic)
        made += records("B5", run, found, load=_LOAD, axis="input_output_ratio", at=each)
        naive, ours = ([m["s_per_token"] for m in found[label]] for label in (MLFQ, SKIP_JOIN))
        gain = ratio(naive, ours)
        made.append(
            Record.of(
                "B5",
                run.engine,
                SKIP_JOIN,
                _GAIN,
                gain,
                load=_LOAD,
                axis="input_output_ratio",
                at=each,
            )
        )
    return made


def _sized(run: Run, usual: Bench, in_out: float) -> Bench:
    """More jobs where each is short, so that waiting has time to build up."""
    count = run.sized(800 if in_out < 4 else 2000, 150)
    return replace(usual, count=count, backlog=run.sized(800, 200))


def _tables(results: Results) -> list[Table]:
    found = results.where(experiment="B5")
    return [_table(found.where(engine=e), plots.ENGINE_TITLES[e]) for e in engines_of(found)]


def _table(found: Results, title: str) -> Table:
    ratios = [float(str(at)) for at in found.distinct("at")]
    rows = []
    for each in ratios:
        cells = [
            *found.where(metric="s_per_token", at=each),
            *found.where(metric=_GAIN, at=each),
        ]
        rows.append((f"{each:g}", *(with_interval(cell) for cell in cells)))
    header = ("input/output", *(f"s/token, {o.label}" for o in _ORDERS), "mlfq / skip-join")
    return Table(f"{title}, load {_LOAD:g}", header, tuple(rows))


def _draw(results: Results, folder: Path) -> list[Path]:
    found = results.where(experiment="B5", metric="s_per_token_vs_fcfs")
    engines = engines_of(found)
    if not engines:
        return []
    made, axes = plots.figure(len(engines))
    for panel, engine in zip(axes[0], engines, strict=True):
        for order in _ORDERS:
            points = list(found.where(engine=engine, policy=order.label))
            plots.line(panel, [p.at or 0.0 for p in points], points, order.label)
        panel.set_xscale("log", base=2)
        ticks = [p.at or 0.0 for p in found.where(engine=engine, policy=FCFS)]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xlabel("input tokens over output tokens")
        panel.set_ylabel("latency per token, over FCFS's")
        plots.title(panel, plots.ENGINE_TITLES[engine])
    plots.legend_below(made, axes[0][0])
    return [plots.save(made, folder / "b5-input-output.png")]


def _bars(results: Results) -> list[Bar]:
    found = results.where(experiment="B5", metric=_GAIN)
    return [
        Bar(
            f"input/output {r.at:g}: per-token latency, naive MLFQ over skip-join",
            r.engine,
            r.value,
            1.1,
            True,
        )
        for r in found
        if r.at is not None and r.at >= 50
    ]


EXPERIMENTS = (
    Experiment(
        "B5",
        "Skip-join against naive MLFQ",
        ("real", "simulator"),
        measure=_measure,
        draw=_draw,
        bars=_bars,
        tables=_tables,
    ),
)
