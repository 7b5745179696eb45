"""The plots of the engine's benchmark. Needs matplotlib, which is the optional dependency group
`bench`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from baton.plots import pyplot
from engine.bench.records import Point, Record, Setup, points

_CONTEXT = 128
_COLOURS = ("#1F77B4", "#E3A33B", "#55A868", "#D1495B", "#8172B3", "#7F7F7F")


def draw(records: list[Record], folder: Path) -> list[Path]:
    """Write a PNG of step times and one of utilization; returns their paths. Raises ConfigError
    without matplotlib."""
    found = [point for point in points(records) if point.floor is not None]
    if not found:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return [_times(found, folder / "engine-batch.png"), _shares(found, folder / "engine-share.png")]


def _figure(columns: int, rows: int) -> Any:
    return pyplot().subplots(
        rows, columns, figsize=(4.8 * columns, 3.8 * rows), squeeze=False, layout="constrained"
    )


def _models(found: list[Point]) -> list[str]:
    return list(dict.fromkeys(point.setup.model for point in found))


def _setups(found: list[Point]) -> list[Setup]:
    return list(dict.fromkeys(point.setup for point in found))


def _name(setup: Setup) -> str:
    return f"{setup.backend}, {setup.precision}"


def _times(found: list[Point], path: Path) -> Path:
    """Step time over the batch, with the floor as a dashed line."""
    models = _models(found)
    figure, panels = _figure(len(models), 1)
    for panel, model in zip(panels[0], models, strict=True):
        mine = [p for p in found if p.setup.model == model and _is_generation(p)]
        for colour, setup in zip(_COLOURS, _setups(mine), strict=False):
            line = [p for p in mine if p.setup == setup]
            batches = [p.batch for p in line]
            panel.plot(
                batches, [p.seconds * 1e3 for p in line], "o-", color=colour, label=_name(setup)
            )
            fastest = [p.fastest_seconds * 1e3 for p in line]
            panel.plot(batches, fastest, ":", color=colour, label=f"the fastest, {_name(setup)}")
            floors = [(p.floor or 0) * 1e3 for p in line]
            label = f"floor, {setup.precision}"
            panel.plot(batches, floors, "--", color=colour, alpha=0.6, label=label)
        panel.set(title=f"{model}: a step of generation", xlabel="batch", ylabel="ms")
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
        _axis(panel, [p.batch for p in mine])
    figure.savefig(path, dpi=110)
    return path


def _shares(found: list[Point], path: Path) -> Path:
    """MBU and MFU: generation over the batch, prompts over the length of the chunk."""
    models = _models(found)
    figure, panels = _figure(2, len(models))
    for row, model in zip(panels, models, strict=True):
        mine = [p for p in found if p.setup.model == model]
        _share_panel(row[0], [p for p in mine if _is_generation(p)], lambda p: p.batch)
        row[0].set(title=f"{model}: generation, context {_CONTEXT}", xlabel="batch")
        _share_panel(row[1], [p for p in mine if _is_prompt(p)], lambda p: p.tokens)
        row[1].set(title=f"{model}: a prompt chunk", xlabel="tokens")
    figure.savefig(path, dpi=110)
    return path


def _share_panel(panel: Any, chosen: list[Point], at: Callable[[Point], int]) -> None:
    for colour, setup in zip(_COLOURS, _setups(chosen), strict=False):
        line = [p for p in chosen if p.setup == setup]
        places = [at(p) for p in line]
        panel.plot(places, [p.mbu for p in line], "o-", color=colour, label=f"MBU, {_name(setup)}")
        panel.plot(places, [p.mfu for p in line], "s--", color=colour, label=f"MFU, {_name(setup)}")
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set(ylabel="share of the machine's ceiling", ylim=(0, 1.08))
    _axis(panel, [at(p) for p in chosen])


def _axis(panel: Any, places: list[int]) -> None:
    ticks = sorted(set(places))
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)


def _is_generation(point: Point) -> bool:
    return point.workload == "generation" and point.context == _CONTEXT


def _is_prompt(point: Point) -> bool:
    return point.workload == "prompt" and point.batch == 1 and point.tokens == point.context
