"""Records of devices, the file that keeps them, and the page that shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu import report
from benchmarks.gpu.records import Record, Source, load, save

ROOT = Path(__file__).parents[3]
SOURCE = Source("NVIDIA H200", "2026-11-21", "2.13.0")
PAGE = "a\n<!-- gpu figures -->\nold\n<!-- end -->\nb\n"


def passes(seconds: float, form: str = "none", source: Source = SOURCE) -> list[Record]:
    values = {"seconds": seconds, "mbu": 0.8, "mfu": 0.01}
    return source.records("passes", "generation 1 x 128", values, shape="llama-3-8b", form=form)


def test_a_later_run_replaces_what_it_measured_again_and_keeps_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "new" / SOURCE.file
    save(file, passes(0.006) + passes(0.003, "int4"))
    later = passes(0.005, source=Source("NVIDIA H200", "2026-11-22", "2.13.0"))
    save(file, later)
    assert load(file) == passes(0.003, "int4") + later
    assert file.name == "nvidia-h200.json"
    assert [child.name for child in file.parent.iterdir()] == [file.name]


def test_a_page_without_figures_says_that_they_are_owed() -> None:
    filled = report.fill(PAGE, [], "")
    assert filled == f"a\n<!-- gpu figures -->\n\n{report.OWED}\n\n<!-- end -->\nb\n"
    assert report.fill(filled, [], "") == filled


def test_a_page_has_the_tables_of_every_device() -> None:
    other = Source("NVIDIA A100", "2026-11-22", "2.12.0")
    records = passes(0.006) + passes(0.003, "int4") + passes(0.01, source=other)
    filled = report.fill(PAGE, records, "gpu.png")
    assert "### NVIDIA H200\n\n2026-11-21, torch 2.13.0." in filled
    assert "### NVIDIA A100\n\n2026-11-22, torch 2.12.0." in filled
    assert "| llama-3-8b, bfloat16, generation 1 x 128 | 6.000 | 0.80 | 0.01 |  |  |  |" in filled
    assert (
        "| int4 over bfloat16, batch 1 | llama-3-8b, int4, generation 1 x 128 | 2.000 |" in filled
    )
    assert report.OWED not in filled


def test_a_page_without_a_place_for_the_figures_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 places"):
        report.fill("nothing\n", [], "")


def test_the_page_shows_the_records_that_are_there() -> None:
    records = report.all_records(ROOT / "docs" / "performance" / "gpu")
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert report.fill(page, records, "gpu.png" if records else "") == page


def test_the_plot_shows_each_pass(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.draw(passes(0.006), tmp_path / "img" / "gpu.png")
    assert (tmp_path / "img" / "gpu.png").read_bytes().startswith(b"\x89PNG")
