"""The tables and the chart of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from baton.plots import pyplot
from benchmarks.peers.records import FLOOR, HIGHER_IS_BETTER, Case, Record, cases

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_UNITS = {"output_tokens_per_s": "output tokens/s", "ttft_s": "TTFT, ms", "tpot_s": "TPOT, ms"}
_BATON, _OTHER, _FLOOR = "#1F77B4", "#BBBBBB", "#555555"


def rows(records: Sequence[Record], case: Case, reference: str) -> list[tuple[str, str, str, str]]:
    """System, median, how many times better `reference` is, share of the floor that it reaches;
    the best first."""
    medians = case.medians(records)
    better = case.metric in HIGHER_IS_BETTER
    names = sorted(medians, key=lambda name: medians[name], reverse=better)
    return [
        (
            name,
            _value(case, medians[name]),
            _ratio(case.ratio(records, reference, name)),
            _ratio(case.ratio(records, name, FLOOR)),
        )
        for name in names
    ]


def header(case: Case, reference: str) -> tuple[str, str, str, str]:
    """Of the columns of `rows`."""
    return ("system", _UNITS[case.metric], f"{reference} is times better", "of the floor")


def title(case: Case) -> str:
    """What a table or panel shows."""
    return f"{case.shape} {case.precision} {case.workload}"


def markdown(records: Sequence[Record], reference: str, notes: Sequence[str]) -> str:
    """All tables as Markdown, then `notes`."""
    parts = []
    for case in cases(records):
        parts.append(f"## {title(case)}: {_UNITS[case.metric]}\n")
        lines = [header(case, reference), ("---", "---:", "---:", "---:")]
        lines += rows(records, case, reference)
        parts += [f"| {' | '.join(line)} |" for line in lines]
        parts.append("")
    return "\n".join([*parts, *(f"- {note}" for note in notes)]).rstrip() + "\n"


def draw(records: Sequence[Record], path: Path) -> None:
    """A row of panels per model and precision, a panel per metric, a bar per system. Needs
    matplotlib (the dependency group `bench`)."""
    plt = pyplot()
    found = cases(records)
    setups = list(dict.fromkeys((case.shape, case.precision) for case in found))
    shown = [metric for metric in _UNITS if any(case.metric == metric for case in found)]
    figure, axes = plt.subplots(
        len(setups),
        len(shown),
        squeeze=False,
        figsize=(4.2 * len(shown), 2.2 * len(setups)),
        dpi=120,
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for case in found:
        place = setups.index((case.shape, case.precision)), shown.index(case.metric)
        _panel(axes[place], case, case.medians(records))
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _panel(axis: Axes, case: Case, medians: dict[str, float]) -> None:
    names = sorted(
        medians, key=lambda name: medians[name], reverse=case.metric not in HIGHER_IS_BETTER
    )
    values = [medians[name] for name in names]
    axis.set_axis_on()
    axis.barh(names, values, color=[_color(name) for name in names], height=0.68)
    for place, value in enumerate(values):
        axis.annotate(
            _value(case, value),
            (value, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.set_title(f"{title(case)}: {_UNITS[case.metric]}", loc="left", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.set_xticks([])
    axis.margins(x=0.18)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _color(name: str) -> str:
    if name == FLOOR:
        return _FLOOR
    return _BATON if name.startswith("baton") else _OTHER


def _value(case: Case, value: float) -> str:
    return f"{value:.0f}" if case.metric in HIGHER_IS_BETTER else f"{value * 1e3:.1f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
