"""Plots and tables of the experiments that compare orders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from experiments import plots
from experiments.experiment import Table
from experiments.records import ENGINES, EngineName, Record, Results

_COLUMNS = (
    ("mean_jct_s", "mean JCT"),
    ("p99_jct_s", "P99 JCT"),
    ("s_per_token", "s/token"),
    ("mean_ttft_s", "mean TTFT"),
    ("p99_ttft_s", "P99 TTFT"),
    ("peak_kv_tokens", "peak KV"),
    ("makespan_s", "makespan"),
)
_PANELS = (
    ("s_per_token", "latency per output token, s"),
    ("mean_jct_s", "mean JCT, s"),
    ("p99_jct_s", "P99 JCT, s"),
    ("mean_ttft_s", "mean TTFT, s"),
)


def engines_of(results: Results) -> list[EngineName]:
    """The engines that have results, the simulator first."""
    return [name for name in ENGINES if len(results.where(engine=name))]


def figures(value: float) -> str:
    """Three significant digits, and no more decimals than that."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def with_interval(record: Record) -> str:
    """The value and half the width of its interval."""
    half = (record.ci_high - record.ci_low) / 2
    return (
        f"{figures(record.value)} ± {figures(half)}" if record.seeds > 1 else figures(record.value)
    )


# -- Tables --------------------------------------------------------------------------------


def load_tables(experiment: str) -> Callable[[Results], list[Table]]:
    """A table per engine and load: orders by metrics."""

    def tables(results: Results) -> list[Table]:
        found = results.where(experiment=experiment)
        return [
            _at_load(
                found.where(engine=engine, load=load),
                f"{plots.ENGINE_TITLES[engine]}, load {load:g}",
            )
            for engine in engines_of(found)
            for load in sorted(_loads(found.where(engine=engine)))
        ]

    return tables


def _at_load(found: Results, title: str) -> Table:
    rows = []
    for policy in found.distinct("policy"):
        each = {r.metric: r for r in found.where(policy=str(policy))}
        rows.append((str(policy), *(with_interval(each[metric]) for metric, _ in _COLUMNS)))
    return Table(title, ("order", *(name for _, name in _COLUMNS)), tuple(rows))


def ratio_tables(experiment: str, metric: str, title: str) -> Callable[[Results], list[Table]]:
    """A table per engine: one metric, orders by load."""

    def tables(results: Results) -> list[Table]:
        found = results.where(experiment=experiment, metric=metric)
        return [
            _by_load(found.where(engine=e), f"{title}, {plots.ENGINE_TITLES[e]}")
            for e in engines_of(found)
        ]

    return tables


def _by_load(found: Results, title: str) -> Table:
    loads = sorted(_loads(found))
    rows = []
    for policy in found.distinct("policy"):
        each = {r.load: r for r in found.where(policy=str(policy))}
        rows.append((str(policy), *(with_interval(each[load]) for load in loads if load in each)))
    return Table(title, ("order", *(f"load {load:g}" for load in loads)), tuple(rows))


def _loads(found: Results) -> set[float]:
    return {r.load for r in found if r.load is not None}


# -- Plots ---------------------------------------------------------------------------------


def draw_loads(results: Results, folder: Path) -> list[Path]:
    """B1 with B2 as its last point: four metrics over the load, a row per engine."""
    found = Results([*results.where(experiment="B1"), *results.where(experiment="B2")])
    engines = engines_of(results.where(experiment="B1"))
    if not engines:
        return []
    made, axes = plots.figure(len(_PANELS), len(engines))
    for row, engine in zip(axes, engines, strict=True):
        for panel, (metric, name) in zip(row, _PANELS, strict=True):
            for policy in found.where(engine=engine).distinct("policy"):
                points = _points(found.where(engine=engine, policy=str(policy), metric=metric))
                plots.line(panel, [p.load or 0.0 for p in points], points, str(policy))
            plots.log_scale(panel)
            panel.set_xlabel("load (arrivals over saturation rate)")
            panel.set_ylabel(name)
            plots.title(panel, plots.ENGINE_TITLES[engine])
    plots.legend_below(made, axes[0][0])
    return [plots.save(made, folder / "b1-load.png")]


def _points(found: Results) -> list[Record]:
    return sorted(found, key=lambda r: r.load or 0.0)


def draw_overload(results: Results, folder: Path) -> list[Path]:
    """B2: what each order makes of overload, over what FCFS makes of it."""
    panels = (
        ("s_per_token_vs_fcfs", "latency per token"),
        ("mean_jct_s_vs_fcfs", "mean JCT"),
        ("p99_jct_s_vs_fcfs", "P99 JCT"),
    )
    return _bars(
        results.where(experiment="B2"), panels, "over FCFS's, load 1.2", folder / "b2-overload.png"
    )


def draw_demo(results: Results, folder: Path) -> list[Path]:
    """DEMO: as B2, at load 0.9."""
    return _at_nine_tenths("DEMO", results, folder / "demo-lengths.png")


def draw_bursts(results: Results, folder: Path) -> list[Path]:
    """BURSTS: the same."""
    return _at_nine_tenths("BURSTS", results, folder / "bursts.png")


def _at_nine_tenths(experiment: str, results: Results, file: Path) -> list[Path]:
    panels = (
        ("s_per_token_vs_fcfs", "latency per token"),
        ("mean_jct_s_vs_fcfs", "mean JCT"),
        ("p99_jct_s_vs_fcfs", "P99 JCT"),
    )
    found = results.where(experiment=experiment, load=0.9)
    return _bars(found, panels, "over FCFS's, load 0.9", file)


def draw_optimality(results: Results, folder: Path) -> list[Path]:
    """B4: mean and P99 JCT over the oracle's at load 0.9."""
    panels = (("mean_jct_s_vs_oracle", "mean JCT"), ("p99_jct_s_vs_oracle", "P99 JCT"))
    found = results.where(experiment="B4", load=0.9)
    return _bars(found, panels, "over the oracle's, load 0.9", folder / "b4-optimality.png")


def draw_peaks(results: Results, folder: Path) -> list[Path]:
    """B6: peak KV over FCFS's, by load."""
    found = results.where(experiment="B6", metric="peak_kv_tokens_vs_fcfs")
    engines = engines_of(found)
    if not engines:
        return []
    made, axes = plots.figure(len(engines))
    for panel, engine in zip(axes[0], engines, strict=True):
        for policy in found.where(engine=engine).distinct("policy"):
            points = _points(found.where(engine=engine, policy=str(policy)))
            plots.line(panel, [p.load or 0.0 for p in points], points, str(policy))
        panel.set_xlabel("load (arrivals over saturation rate)")
        panel.set_ylabel("peak KV tokens, over FCFS's")
        plots.title(panel, plots.ENGINE_TITLES[engine])
    plots.legend_below(made, axes[0][0])
    return [plots.save(made, folder / "b6-peak-kv.png")]


def _bars(found: Results, panels: tuple[tuple[str, str], ...], unit: str, path: Path) -> list[Path]:
    """Horizontal bars with their intervals: a row per engine, a panel per metric."""
    engines = [e for e in engines_of(found) if len(found.where(engine=e, metric=panels[0][0]))]
    if not engines:
        return []
    policies = [str(p) for p in found.distinct("policy")]
    made, axes = plots.figure(len(panels), len(engines), height=0.6 + 0.32 * len(policies))
    for row, engine in zip(axes, engines, strict=True):
        for number, (panel, (metric, name)) in enumerate(zip(row, panels, strict=True)):
            plots.bars(panel, list(found.where(engine=engine, metric=metric)), names=number == 0)
            panel.set_xlabel(f"{name} {unit}")
            if number == 0:
                plots.title(panel, plots.ENGINE_TITLES[engine])
    return [plots.save(made, path)]
