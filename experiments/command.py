"""`baton bench policies`: runs experiments, shows how far they are, and writes what they gave."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress
from rich.table import Table as RichTable

from baton.errors import ConfigError
from baton.plots import pyplot
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.records import ENGINES, Results
from experiments.registry import chosen

_WIDTH = 160  # columns, where there is no terminal that has any


@dataclass(frozen=True, slots=True)
class Options:
    """The command line. `engine` "both" runs one after the other; `seeds` 0 is 4, or 2 if
    quick."""

    out: Path
    only: str | None = None
    engine: str = "both"
    seeds: int = 0
    quick: bool = False
    plots: bool = True


class _Watched:
    """Progress of one experiment on one engine, as a line of rich's."""

    def __init__(self, progress: RichProgress, title: str) -> None:
        self._progress = progress
        self._title = title
        self._task = progress.add_task(title, total=None)
        self._total = 0

    def expect(self, trials: int) -> None:
        """So many more trials are to come."""
        self._total += trials
        self._progress.update(self._task, total=self._total)

    def done(self, text: str) -> None:
        """One of them has ended."""
        self._progress.update(self._task, advance=1, description=f"{self._title}: {text}")

    def close(self) -> None:
        """All have ended."""
        total = max(self._total, 1)
        self._progress.update(
            self._task, total=total, completed=total, description=f"[green]{self._title}"
        )


def run(options: Options, console: Console | None = None) -> Results:
    """Run the experiments and write results.json, run.json and the plots into `options.out`.

    Raises ConfigError for unknown names, and before anything runs if plots cannot be drawn.
    """
    if options.engine not in ("real", "simulator", "both"):
        raise ConfigError(f"--engine {options.engine}: real, simulator or both")
    if options.plots:
        pyplot()  # before anything runs
    if console is None:
        console = Console(stderr=True)
        if not console.is_terminal:
            console = Console(stderr=True, width=_WIDTH)
    experiments = chosen(options.only)
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results = _measure(options, experiments, console)
    _describe(options, experiments, time.monotonic() - started)
    for experiment in experiments:
        for table in experiment.tables(results):
            console.print(_as_rich(table))
        if options.plots:
            for path in experiment.draw(results, options.out):
                console.print(f"  {path}")
    bars = [bar for experiment in experiments for bar in experiment.bars(results)]
    if bars:
        console.print(_as_rich(bars_table(bars)))
    console.print(f"{len(results)} records in {options.out / 'results.json'}")
    return results


def bars_table(bars: Sequence[Bar]) -> Table:
    """What has to be reached, what was, and whether that is enough."""
    return Table(
        "Bars",
        ("bar", "engine", "wanted", "measured", "met"),
        tuple(
            (bar.claim, bar.engine, bar.wanted, f"{bar.value:.3g}", "yes" if bar.met else "no")
            for bar in bars
        ),
    )


def _measure(options: Options, experiments: Sequence[Experiment], console: Console) -> Results:
    """All experiments on all wanted engines. Results are saved after each, so that a run that is
    ended early leaves what it has."""
    results = Results()
    count = options.seeds or (2 if options.quick else 4)
    with RichProgress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        for engine in ENGINES:
            if options.engine not in (engine, "both"):
                continue
            shared: dict[object, object] = {}
            for experiment in experiments:
                if engine not in experiment.engines:
                    continue
                watched = _Watched(progress, f"{experiment.name} {engine}")
                run = Run(engine, tuple(range(count)), options.quick, watched, shared)
                results.add(experiment.measure(run))
                watched.close()
                results.save(options.out / "results.json")
    return results


def _describe(options: Options, experiments: Sequence[Experiment], seconds: float) -> None:
    """What was run, on what."""
    import numpy as np

    described = {
        "experiments": [experiment.name for experiment in experiments],
        "engine": options.engine,
        "quick": options.quick,
        "seconds": round(seconds, 1),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    (options.out / "run.json").write_text(json.dumps(described, indent=2) + "\n")


def _as_rich(table: Table) -> RichTable:
    made = RichTable(title=table.title, title_justify="left", header_style="bold")
    for number, name in enumerate(table.header):
        made.add_column(name, justify="left" if number == 0 else "right")
    for row in table.rows:
        made.add_row(*row)
    return made
