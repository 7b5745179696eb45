import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from baton.errors import ConfigError
from experiments import command, plots, registry, report
from experiments.command import Options
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.records import Record, Results
from experiments.stats import interval
from launcher.cli import baton


def measure(run: Run) -> list[Record]:
    """Twice its seeds, for every seed."""
    run.progress.expect(len(run.seeds))
    for seed in run.seeds:
        run.progress.done(f"seed {seed}")
    values = [2.0 * seed for seed in run.seeds]
    return [Record.of("T1", run.engine, "fcfs", "value", interval(values), load=0.9)]


def draw(results: Results, folder: Path) -> list[Path]:
    found = list(results.where(experiment="T1"))
    made, axes = plots.figure(1)
    plots.line(axes[0][0], [0.0] * len(found), found, "fcfs")
    return [plots.save(made, folder / "t1.png")]


TOY = Experiment(
    "T1",
    "A toy",
    ("real", "simulator"),
    measure,
    draw,
    bars=lambda results: [
        Bar("twice the seeds", r.engine, r.value, 1.0, at_least=True) for r in results
    ],
    tables=lambda results: [
        Table("toy", ("order", "value"), tuple((r.policy, f"{r.value:g}") for r in results))
    ],
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "chosen", lambda only: [TOY])
    monkeypatch.setattr(report, "NAMES", ("T1",))
    monkeypatch.setattr(report, "experiment", lambda name: TOY)


@pytest.mark.usefixtures("toy")
def test_a_run_leaves_records_plots_and_what_it_was(tmp_path: Path) -> None:
    console = Console(record=True, width=100, quiet=False, file=(tmp_path / "log").open("w"))
    command.run(Options(tmp_path / "out", seeds=3), console)
    console.file.close()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [each["engine"] for each in found] == ["simulator", "real"]
    assert found[0]["value"] == 2.0
    assert found[0]["seeds"] == 3
    assert (tmp_path / "out" / "t1.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["experiments"] == ["T1"]
    said = console.export_text()
    assert "twice the seeds" in said
    assert "yes" in said


@pytest.mark.usefixtures("toy")
def test_one_engine_and_no_plots(tmp_path: Path) -> None:
    console = Console(quiet=True)
    results = command.run(Options(tmp_path, engine="real", seeds=2, plots=False), console)
    assert results.distinct("engine") == ["real"]
    assert not list(tmp_path.glob("*.png"))


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importing = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"baton-serve\[bench\]"):
        command.run(Options(tmp_path, only="B1"), Console(quiet=True))


def test_unknown_experiments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="B99"):
        command.run(Options(tmp_path, only="B1,B99"), Console(quiet=True))


@pytest.mark.parametrize("name", registry.NAMES)
def test_every_experiment_copes_with_no_results(name: str, tmp_path: Path) -> None:
    found = registry.experiment(name)
    assert found.name == name
    assert found.tables(Results()) == []
    assert found.bars(Results()) == []
    assert found.draw(Results(), tmp_path) == []


@pytest.mark.usefixtures("toy")
def test_the_command_line_writes_results_and_plots(tmp_path: Path) -> None:
    arguments = ["bench", "policies", "--only", "T1", "--engine", "simulator", "--seeds", "2"]
    ran = CliRunner().invoke(baton, [*arguments, "--out", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    assert Results.load(tmp_path / "results.json").value(policy="fcfs") == 1.0
    assert (tmp_path / "t1.png").exists()


@pytest.mark.usefixtures("toy")
def test_the_page_gets_the_tables_and_keeps_its_text() -> None:
    page = "Before.\n\n<!-- tables T1 -->\nold\n<!-- end -->\n\nAfter.\n"
    results = Results(measure(Run("real", (1,))))
    filled = report.fill(page, results)
    assert "| fcfs | 2 |" in filled
    assert "old" not in filled
    assert filled.startswith("Before.")
    assert filled.endswith("After.\n")
    assert report.fill(filled, results) == filled


@pytest.mark.usefixtures("toy")
def test_a_page_with_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="T2"):
        report.fill("<!-- tables T2 -->\n<!-- end -->\n", Results())


def test_a_later_run_replaces_the_same_part_of_an_earlier_one(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    Results([*measure(Run("real", (1,))), *measure(Run("simulator", (1,)))]).save(first)
    Results(measure(Run("real", (5,)))).save(second)
    merged = report.merged([first, second])
    assert merged.value(engine="real") == 10.0
    assert merged.value(engine="simulator") == 2.0
