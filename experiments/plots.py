"""What all plots share: colours by policy, axes, intervals as bands. Needs matplotlib, which is
the optional dependency group `bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from baton.plots import pyplot
from experiments.records import Record, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel: TypeAlias = "Axes"
Panels: TypeAlias = "Sequence[Axes]"

_PALETTE = (
    *("#4C72B0", "#DD8452", "#55A868", "#C44E52", "#8172B3"),
    *("#937860", "#DA8BC3", "#64B5CD", "#CCB974", "#8C8C8C"),
)
_COLORS = {
    "fcfs": "#7F7F7F",
    "mlfq": "#E3A33B",
    "skip-join-mlfq": "#D1495B",
    "skip-join-mlfq, promotion": "#EDAE9C",
    "skip-join-mlfq, no lanes": "#EDAE9C",
    "skip-join-mlfq, none ahead": "#8C1C2B",
    "predicted-srpt": "#1F77B4",
    "predicted-srpt, no lanes": "#A9D0E8",
    "predicted-srpt, none ahead": "#0B3C5D",
    "predicted-srpt, sigma 0.5": "#5FA8D3",
    "predicted-srpt, sigma 1": "#A9D0E8",
    "srpt-oracle": "#222222",
    "proactive": "#1F77B4",
    "reactive": "#E3A33B",
    "recompute": "#7F7F7F",
    "reserve-max": "#7F7F7F",
    "reserve-sum": "#E3A33B",
    "reserve-sum, oracle": "#F2D09B",
    "reserve-predicted": "#1F77B4",
    "reserve-predicted, sigma 0.5": "#5FA8D3",
    "reserve-predicted, sigma 1": "#A9D0E8",
    "reserve-predicted, oracle": "#222222",
    "paged": "#55A868",
    "prefill-first": "#E3A33B",
    "splitfuse": "#1F77B4",
    "round-robin": "#7F7F7F",
    "round-robin, late": "#B8B8B8",
    "least-outstanding": "#E3A33B",
    "kv-aware": "#1F77B4",
    "kv-aware, late": "#A9D0E8",
    "static": "#7F7F7F",
    "dynamic": "#E3A33B",
    "continuous": "#1F77B4",
}
_SEEDS_FOR_A_BAND = 3  # the interval of two covers the whole plot
ENGINE_TITLES = {"real": "real engine", "simulator": "simulator"}


def color(policy: str) -> str:
    """The colour of a policy, the same in all plots; others get one by their name."""
    if policy in _COLORS:
        return _COLORS[policy]
    return _PALETTE[sum(map(ord, policy)) % len(_PALETTE)]


def figure(columns: int, rows: int = 1, *, width: float = 4.6, height: float = 3.4) -> Any:
    """A figure and its axes, as `plt.subplots(rows, columns, squeeze=False)` gives them."""
    made, axes = pyplot().subplots(
        rows, columns, squeeze=False, figsize=(width * columns, height * rows), dpi=120
    )
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#DDDDDD", linewidth=0.7)
        each.set_axisbelow(True)
    return made, axes


def panels(
    results: Results,
    path: Path,
    columns: int,
    draw: Callable[[Results, Panels], None],
    *,
    width: float,
) -> list[Path]:
    """Write a figure of `columns` panels side by side, filled by `draw`. Returns its path, or
    nothing without results."""
    if not len(results):
        return []
    made, axes = figure(columns, width=width)
    draw(results, axes[0])
    return [save(made, path)]


def panels_by_engine(
    results: Results,
    path: Path,
    columns: int,
    draw: Callable[[Results, str, Panels], None],
) -> list[Path]:
    """Write a figure with a row of `columns` panels for each engine that has results: `draw` is
    given those, the engine's title and the row. One legend serves all. Returns its path, or
    nothing without results."""
    engines = [engine for engine in ENGINE_TITLES if len(results.where(engine=engine))]
    if not engines:
        return []
    made, axes = figure(columns, len(engines))
    for row, engine in zip(axes, engines, strict=True):
        draw(results.where(engine=engine), ENGINE_TITLES[engine], row)
    legend_below(made, *axes[0])
    return [save(made, path)]


def title(axes: Axes, text: str) -> None:
    """What a panel shows, above it on the left."""
    axes.set_title(text, loc="left", fontsize=9, color="#666666")


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis around the lines, not their bands, with plain numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    drawn = [np.asarray(each.get_ydata(), float) for each in axes.get_lines()]
    values = [float(y) for each in drawn for y in each if y > 0]
    axes.set_yscale("log")
    if values:
        axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def line(axes: Axes, xs: Sequence[float], records: Sequence[Record], label: str) -> None:
    """Values over `xs` in the colour of `label`, with their intervals as a band."""
    shade = color(label)
    axes.plot(xs, [r.value for r in records], "o-", color=shade, label=label, ms=3.5, lw=1.6)
    if all(r.seeds >= _SEEDS_FOR_A_BAND for r in records):
        low, high = [r.ci_low for r in records], [r.ci_high for r in records]
        axes.fill_between(xs, low, high, color=shade, alpha=0.12, lw=0)


def bars(axes: Axes, records: Sequence[Record], *, names: bool) -> None:
    """A horizontal bar per record, labelled with its value; a line at 1. For ratios."""
    places = range(len(records))
    values = [r.value for r in records]
    errors = [
        [max(0.0, r.value - r.ci_low) for r in records],
        [max(0.0, r.ci_high - r.value) for r in records],
    ]
    axes.barh(places, values, color=[color(r.policy) for r in records], height=0.68)
    axes.errorbar(values, places, xerr=errors, fmt="none", ecolor="#555555", lw=1, capsize=2)
    for place, record in zip(places, records, strict=True):
        axes.annotate(
            f"{record.value:.2f}",
            (max(record.ci_high, record.value), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(1.0, color="#555555", lw=0.8, ls=":")
    axes.set_yticks(places, [r.policy for r in records] if names else [""] * len(records))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.14)
    axes.set_xlim(left=0)


def legend_below(made: Figure, *shown: Axes) -> None:
    """One legend for all panels, taken from some of them."""
    handles = {
        label: handle
        for axes in shown
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    made.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        ncol=min(len(handles), 4),
        frameon=False,
    )


def save(made: Figure, path: Path) -> Path:
    """Write the PNG and free the figure."""
    import matplotlib.pyplot as plt

    made.tight_layout()
    made.savefig(path, bbox_inches="tight")
    plt.close(made)
    return path
