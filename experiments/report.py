"""Puts the tables and plots of runs into docs/experiments.md.

    python -m experiments.report RUN/results.json [MORE/results.json ...] \\
        --page docs/experiments.md --plots docs/img --save docs/experiments/results.json

Records of a later file replace those of the same experiment and engine in earlier ones, so a part
that was run again goes last. Without --page, the tables are printed.

The page has a pair of comments per experiment, `<!-- tables B1 -->` and `<!-- end -->`, and one
pair for `bars`. What stands between them is replaced; all other text is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import rich_click as click

from experiments.command import bars_table
from experiments.experiment import Table
from experiments.records import Record, Results
from experiments.registry import NAMES, experiment

_BLOCK = re.compile(r"(<!-- tables (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, results: Results) -> str:
    """The page with the tables of `results` in their places. Raises ValueError if the page names
    an experiment that there is not."""

    def replaced(found: re.Match[str]) -> str:
        tables = _tables(found["name"], results)
        body = "\n".join(markdown(table) for table in tables) or "Not run.\n"
        return f"{found[1]}\n{body}\n{found[3]}"

    return _BLOCK.sub(replaced, page)


def markdown(table: Table) -> str:
    """A table as GitHub shows it."""
    lines = [
        f"**{table.title}**",
        "",
        _row(table.header),
        _row(("---", *("---:" for _ in table.header[1:]))),
        *(_row(row) for row in table.rows),
    ]
    return "\n".join(lines) + "\n"


def _tables(name: str, results: Results) -> list[Table]:
    if name == "bars":
        found = [bar for each in NAMES for bar in experiment(each).bars(results)]
        return [bars_table(found)] if found else []
    if name not in NAMES:
        raise ValueError(f"the page wants tables of {name}; there are {', '.join(NAMES)}")
    return experiment(name).tables(results)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def merged(files: Sequence[Path]) -> Results:
    """The records of several files."""
    kept: dict[tuple[str, str], list[Record]] = {}
    for file in files:
        found: dict[tuple[str, str], list[Record]] = {}
        for record in Results.load(file):
            found.setdefault((record.experiment, record.engine), []).append(record)
        kept |= found
    return Results(record for records in kept.values() for record in records)


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--page", type=click.Path(exists=True, path_type=Path), help="page to fill")
@click.option("--plots", type=click.Path(path_type=Path), help="folder for the PNG files")
@click.option("--save", type=click.Path(path_type=Path), help="file for the merged records")
def main(files: tuple[Path, ...], page: Path | None, plots: Path | None, save: Path | None) -> None:
    """Merge FILES, and put their tables and plots into a page."""
    results = merged(files)
    if save is not None:
        results.save(save)
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            experiment(name).draw(results, plots)
    if page is not None:
        page.write_text(fill(page.read_text(), results))
    else:
        for name in (*NAMES, "bars"):
            for table in _tables(name, results):
                click.echo(markdown(table))


if __name__ == "__main__":
    main()
