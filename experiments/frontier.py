"""FRONTIER: what the one knob of predicted-srpt buys, mean against tail, at load 0.9."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import plots
from experiments.benches import bench
from experiments.compare import records, trials
from experiments.experiment import Experiment, Run, Table
from experiments.orders import BOUND, LEARNED, UNPREDICTED, predicted
from experiments.policy_reports import engines_of, with_interval
from experiments.records import Record, Results

_KNOB = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
_QUICK = (0.0, 1.0)
_LOAD = 0.9
_METRICS = ("mean_jct_s", "p99_jct_s", "s_per_token", "mean_ttft_s", "peak_kv_tokens")


def _measure(run: Run) -> list[Record]:
    made = bench(run)
    others = trials(run, made, (*UNPREDICTED, BOUND), _LOAD)
    found = records("FRONTIER", run, others, load=_LOAD, names=_METRICS)
    for knob in run.sized(_KNOB, _QUICK):
        # The default is B1's: the same label, so it is not measured twice.
        label = LEARNED if knob == 1.0 else f"{LEARNED}, aging {knob:g}"
        tuned = trials(run, made, [predicted(aging=knob, label=label)], _LOAD)
        each = {LEARNED: tuned[label]}
        found += records(
            "FRONTIER", run, each, load=_LOAD, axis="srpt_aging", at=knob, names=_METRICS
        )
    return found


def _tables(results: Results) -> list[Table]:
    found = results.where(experiment="FRONTIER")
    return [_table(found.where(engine=e), plots.ENGINE_TITLES[e]) for e in engines_of(found)]


def _table(found: Results, title: str) -> Table:
    rows = []
    for policy, at in dict.fromkeys((r.policy, r.at) for r in found):
        each = {
            r.metric: r for r in found.where(policy=policy) if r.at == at and r.metric in _METRICS
        }
        name = policy if at is None else f"{policy}, aging {at:g}"
        rows.append((name, *(with_interval(each[metric]) for metric in _METRICS)))
    header = ("order", "mean JCT", "P99 JCT", "s/token", "mean TTFT", "peak KV")
    return Table(f"{title}, load {_LOAD:g}", header, tuple(rows))


def _draw(results: Results, folder: Path) -> list[Path]:
    found = results.where(experiment="FRONTIER")
    engines = engines_of(found)
    if not engines:
        return []
    made, axes = plots.figure(len(engines), width=5.6, height=4.2)
    for panel, engine in zip(axes[0], engines, strict=True):
        here = found.where(engine=engine)
        means, tails = here.where(metric="mean_jct_s"), here.where(metric="p99_jct_s")
        curve = sorted((r.at, r.value) for r in means if r.at is not None)
        values = [(mean, tails.value(at=at) or 0.0) for at, mean in curve]
        shade = plots.color(LEARNED)
        panel.plot(*zip(*values, strict=True), "o-", color=shade, lw=1.6, ms=5)
        for (at, _), point in zip(curve, values, strict=True):
            _name(panel, point, f"aging {at:g}", shade)
        for record in means:
            if record.at is None:
                point = (record.value, tails.value(policy=record.policy) or 0.0)
                panel.plot(*point, "s", color=plots.color(record.policy), ms=6)
                _name(panel, point, record.policy, plots.color(record.policy))
        panel.set_xlabel("mean JCT, s")
        panel.set_ylabel("P99 JCT, s")
        panel.margins(x=0.22, y=0.12)
        panel.set_title(
            f"{plots.ENGINE_TITLES[engine]}, load {_LOAD:g}",
            loc="left",
            fontsize=9,
            color="#666666",
        )
    return [plots.save(made, folder / "frontier.png")]


def _name(panel: Any, point: tuple[float, float], text: str, shade: str) -> None:
    panel.annotate(text, point, xytext=(6, 4), textcoords="offset points", fontsize=8, color=shade)


EXPERIMENTS = (
    Experiment(
        "FRONTIER",
        "Mean against tail: the knob of predicted-srpt",
        ("simulator",),
        measure=_measure,
        draw=_draw,
        tables=_tables,
    ),
)
