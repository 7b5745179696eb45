"""Puts the tables of a run into docs/experiments.md.

    python -m experiments.report docs/experiments/results.json docs/experiments.md

The page has a pair of comments per experiment, `<!-- tables B1 -->` and `<!-- end -->`, and one
pair for `bars`. What stands between them is replaced; all other text is left as it is.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from experiments.command import bars_table
from experiments.experiment import Table
from experiments.records import Results
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


def main(arguments: list[str]) -> None:
    """Without a page, print all tables."""
    results = Results.load(Path(arguments[0]))
    if len(arguments) == 1:
        for name in (*NAMES, "bars"):
            for table in _tables(name, results):
                print(markdown(table))
        return
    page = Path(arguments[1])
    page.write_text(fill(page.read_text(), results))


if __name__ == "__main__":
    main(sys.argv[1:])
