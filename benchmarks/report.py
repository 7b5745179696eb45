"""Puts the tables and plots of saved results into docs/performance.md.

    python -m benchmarks.report --results docs/performance --page docs/performance.md \\
        --plots docs/img

RESULTS holds one folder or file per benchmark, as each wrote it with --out: engine*.json (`baton
bench engine`: its results.json), host-work*.json, startup*.json, accuracy*.json, sampling*.json
and peers*.json (`python -m benchmarks.peers`: its results.json). Several of a kind become one
table.

The page has pairs of comments, `<!-- tables NAME -->` and `<!-- end -->`. What stands between them
is replaced; all other text is left as it is. Without --page the tables are printed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from benchmarks import accuracy, host_work, sampling, startup
from benchmarks.peers import records as peer_records
from benchmarks.peers import report as peer_report
from engine.bench import plots
from engine.bench.records import Record, load
from engine.bench.tables import tables

_BLOCK = re.compile(r"(<!-- tables (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_REFERENCE = "baton"
OWN = {
    "host-work": host_work.table,
    "startup": startup.table,
    "accuracy": accuracy.table,
    "sampling": sampling.table,
}
ENGINE = ("ceilings", "prompts", "batches", "contexts", "cost", "beside")


def fill(page: str, found: dict[str, str]) -> str:
    """The page with these tables in their places; a place that no benchmark has filled says so.
    Raises ValueError if the page names a table that there never is."""

    def replaced(place: re.Match[str]) -> str:
        name = place["name"]
        if name not in (*ENGINE, *OWN, "peers"):
            raise ValueError(f"the page wants tables of {name}, which no benchmark makes")
        return f"{place[1]}\n{found.get(name, 'Not run.').rstrip()}\n\n{place[3]}"

    return _BLOCK.sub(replaced, page)


def made_of(results: Path) -> dict[str, str]:
    """The Markdown of every table that there are results for, by name."""
    found = {name: table.markdown() for name, table in tables(_all(results, "engine")).items()}
    for name, table in OWN.items():
        if records := _all(results, name):
            found[name] = table(records).markdown()
    if compared := _peers(results):
        found["peers"] = peer_report.markdown(compared, _REFERENCE, ()).replace("## ", "### ")
    return found


def _all(results: Path, name: str) -> list[Record]:
    return [record for file in sorted(results.glob(f"{name}*.json")) for record in load(file)]


def _peers(results: Path) -> list[peer_records.Record]:
    return [
        peer_records.Record(**each)
        for file in sorted(results.glob("peers*.json"))
        for each in json.loads(file.read_text())
    ]


@click.command()
@click.option(
    "--results", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--page", type=click.Path(exists=True, path_type=Path), help="page to fill")
@click.option("--plots", "folder", type=click.Path(path_type=Path), help="folder for the PNG files")
def main(results: Path, page: Path | None, folder: Path | None) -> None:
    """Fill the page with what RESULTS holds, and draw the plots."""
    found = made_of(results)
    if folder is not None:
        plots.draw(_all(results, "engine"), folder)
        if compared := _peers(results):
            peer_report.draw(compared, folder / "peers.png")
    if page is None:
        click.echo("\n".join(found.values()))
    else:
        page.write_text(fill(page.read_text(), found))


if __name__ == "__main__":
    main()
