"""B10: gaps between tokens under Dynamic SplitFuse and with whole prompts first."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments import plots
from experiments.benches import rotated
from experiments.closed_loop import PREFILL_FIRST, SPLITFUSE, WHOLE, Shape, stage
from experiments.collect import Point, Samples
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.records import ENGINES, Record, Results
from scheduling.simulator.outcome import Outcome

NAME = "B10"
BUDGETS = (512, 768, 1024, 1536, 2048)
CHOSEN = 1536
"""The smallest of these budgets at which fewer than half of the passes carry prompt: 16 prompts of
2600 tokens for every 60 passes."""

_SHAPE = Shape(2600, 60)
_PAIR = f"{PREFILL_FIRST} / {SPLITFUSE}"
_SHADES = {"mean": "#C44E52", "P50": "#1F77B4", "P95": "#FF7F0E", "P99": "#2CA02C"}
_METRICS = ("p50_gap_s", "p95_gap_s", "p99_gap_s", "mean_ttft_s", "p95_ttft_s", "requests_per_s")


def _point(budget: int) -> Point:
    if budget == WHOLE:
        return Point(PREFILL_FIRST)
    return Point(SPLITFUSE, axis="token budget", at=budget)


def _measure(run: Run) -> list[Record]:
    ground = stage(run)
    samples = Samples(NAME, run.engine)
    budgets = run.sized(BUDGETS, (768, CHOSEN))
    run.progress.expect(len(run.seeds) * (1 + len(budgets)))
    for number, seed in enumerate(run.seeds):
        for budget in rotated((WHOLE, *budgets), number):
            point = _point(budget)
            outcome = ground.serve(_SHAPE, seed, batching=point.policy, budget=budget)
            samples.add(point, **_metrics(outcome))
            run.progress.done(f"{NAME} {point.policy} {budget}")
    for budget in budgets:
        for metric in _METRICS:
            samples.compare(_point(WHOLE), _point(budget), metric)
    return samples.records()


def _metrics(outcome: Outcome) -> dict[str, float]:
    kept = outcome.after_warmup()
    gaps, ttft = kept.gaps(), kept.first_token()
    return {
        "p50_gap_s": float(np.percentile(gaps, 50)),
        "p95_gap_s": float(np.percentile(gaps, 95)),
        "p99_gap_s": float(np.percentile(gaps, 99)),
        "mean_ttft_s": float(ttft.mean()),
        "p95_ttft_s": float(np.percentile(ttft, 95)),
        "requests_per_s": outcome.completion_rate(),
    }


def _tables(results: Results) -> list[Table]:
    mine = results.where(experiment=NAME)
    header = ("", "P50 gap, ms", "P95", "P99", "mean TTFT, ms", "P95", "requests/s")
    tables = []
    for engine in plots.ENGINE_TITLES:
        rows = []
        for budget in (WHOLE, *BUDGETS):
            point = _point(budget)
            here = mine.where(engine=engine, policy=point.policy, at=point.at)
            found = [here.value(metric=metric) for metric in _METRICS]
            values = [value for value in found if value is not None]
            if len(values) == len(_METRICS):
                label = point.policy if point.at is None else f"{point.policy}, {point.at:g} tokens"
                scaled = (f"{1e3 * value:.1f}" for value in values[:-1])
                rows.append((label, *scaled, f"{values[-1]:.2f}"))
        if rows:
            title = f"Gaps between tokens, {plots.ENGINE_TITLES[engine]}"
            tables.append(Table(title, header, tuple(rows)))
    return tables


def _bars(results: Results) -> list[Bar]:
    bars: list[Bar] = []
    for engine in ENGINES:
        found = results.where(experiment=NAME, engine=engine, policy=_PAIR, at=CHOSEN)
        tail, middle = found.value(metric="p95_gap_s_ratio"), found.value(metric="p50_gap_s_ratio")
        if tail is not None and middle is not None:
            name = f"B10 budget {CHOSEN}: gap between tokens, prefill-first over SplitFuse"
            bars += [
                Bar(f"{name}, P95", engine, tail, 2.0, True),
                Bar(f"{name}, P50", engine, middle, 1 / 1.1, True),
            ]
    return bars


def _draw(results: Results, folder: Path) -> list[Path]:
    path = folder / "b10-splitfuse.png"
    return plots.panels_by_engine(results.where(experiment=NAME), path, 2, _draw_row)


def _draw_row(here: Results, title: str, row: plots.Panels) -> None:
    gaps, first_token = row
    for metric, name in (("p50_gap_s", "P50"), ("p95_gap_s", "P95"), ("p99_gap_s", "P99")):
        _sweep(gaps, here, metric, name)
    gaps.set_ylabel(f"gap between tokens, ms\n({title})")
    for metric, name in (("mean_ttft_s", "mean"), ("p95_ttft_s", "P95")):
        _sweep(first_token, here, metric, name)
    first_token.set_ylabel("time to first token, ms")
    first_token.plot([], [], "--", lw=1.2, color="#555555", label="prefill-first")
    for panel in row:
        panel.set_xlabel("token budget of a pass")
        panel.set_ylim(0, None)
        panel.set_xticks(BUDGETS)


def _sweep(panel: plots.Panel, here: Results, metric: str, name: str) -> None:
    """SplitFuse over its budgets, and prefill-first as a level line."""
    found, shade = list(here.where(policy=SPLITFUSE, metric=metric)), _SHADES[name]
    budgets, values = [r.at or 0 for r in found], [1e3 * r.value for r in found]
    panel.plot(budgets, values, "o-", ms=3.5, lw=1.6, color=shade, label=f"SplitFuse, {name}")
    low, high = [1e3 * r.ci_low for r in found], [1e3 * r.ci_high for r in found]
    panel.fill_between(budgets, low, high, color=shade, alpha=0.18)
    level = here.value(policy=PREFILL_FIRST, metric=metric)
    if level is not None:
        panel.axhline(1e3 * level, ls="--", lw=1.2, color=shade)


EXPERIMENTS = (
    Experiment(
        name=NAME,
        title="Gaps between tokens: SplitFuse and prefill-first",
        engines=("simulator", "real"),
        measure=_measure,
        draw=_draw,
        bars=_bars,
        tables=_tables,
    ),
)
