"""The page of figures is filled from saved results, and nothing else of it changes."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from engine.bench.records import Setup, plain, save

ROOT = Path(__file__).parents[2]
SETUP = Setup("baton", "torch", "tiny", "float32", 2)


@pytest.fixture
def report(importable: None) -> ModuleType:
    """benchmarks/report.py."""
    return importlib.import_module("benchmarks.report")


def test_tables_stand_between_their_markers_and_all_else_stays(report: ModuleType) -> None:
    page = "a\n<!-- tables cost -->\nold\n<!-- end -->\nb\n<!-- tables peers -->\n<!-- end -->\n"
    filled = report.fill(page, {"cost": "new\n"})
    assert filled == (
        "a\n<!-- tables cost -->\n\nnew\n\n<!-- end -->\nb\n"
        "<!-- tables peers -->\n\nNot run.\n\n<!-- end -->\n"
    )
    assert report.fill(filled, {"cost": "new\n"}) == filled


def test_a_table_that_no_benchmark_makes_is_an_error(report: ModuleType) -> None:
    with pytest.raises(ValueError, match="tables of costs"):
        report.fill("<!-- tables costs -->\n<!-- end -->\n", {})


def test_results_of_several_runs_become_one_table(report: ModuleType, tmp_path: Path) -> None:
    for number, backend in enumerate(("torch", "compiled")):
        setup = Setup("baton", backend, "tiny", "float32", 2)
        names = (*report.host_work.PARTS, "host", "beside")
        values = dict.fromkeys((*names, *(f"fast_{name}" for name in names)), 0.001)
        values |= {"step": 0.01 * (number + 1), "fast_step": 0.004}
        save(tmp_path / f"host-work-{backend}.json", plain(setup, "host-work", values, batch=32))
    found = report.made_of(tmp_path)
    assert list(found) == ["host-work"]
    assert "compiled, 2 threads: ms" in found["host-work"]
    assert "| the step | 20.00 | 100.0% | 4.00 | 100.0% | 10.00 | 100.0% |" in found["host-work"]
    assert "| all but the model | 1.00 | 5.0% | 1.00 | 25.0% | 1.00 | 10.0% |" in found["host-work"]


def test_every_place_on_the_page_is_one_that_results_can_fill(report: ModuleType) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert report.fill(page, report.made_of(ROOT / "docs" / "performance")) == page
