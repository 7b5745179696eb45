"""Records are flat, and ratios are taken within rounds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.peers import report
from benchmarks.peers.records import Case, Record, cases, load, save

W1 = Case("135m", "w1", "bf16", "output_tokens_per_s")
W2 = Case("135m", "w2", "bf16", "ttft_s")


def record(system: str, number: int, value: float, case: Case = W1) -> Record:
    return Record(system, case.shape, case.workload, case.precision, case.metric, number, value)


RECORDS = [
    *(record("baton", number, value) for number, value in enumerate((100, 300, 80))),
    *(record("other", number, value) for number, value in enumerate((50, 100, 80))),
    *(record("floor", number, 400) for number in range(3)),
    record("baton", 0, 0.1, W2),
    record("other", 0, 0.4, W2),
    record("other", 0, 0.9, Case("135m", "w1", "bf16", "agreement")),
]


def test_records_have_the_agreed_fields_and_survive_a_file(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    save(RECORDS, file)
    assert load(file) == RECORDS
    assert json.loads(file.read_text())[0] == asdict(RECORDS[0]) == {
        "system": "baton",
        "shape": "135m",
        "workload": "w1",
        "precision": "bf16",
        "metric": "output_tokens_per_s",
        "round": 0,
        "value": 100,
    }  # fmt: skip


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    assert W1.ratio(RECORDS, "baton", "other") == 2.0  # of 2, 3 and 1
    assert W1.ratio(RECORDS, "baton", "missing") is None


def test_less_latency_is_better() -> None:
    assert W2.ratio(RECORDS, "baton", "other") == pytest.approx(4.0)


def test_only_metrics_that_rank_systems_make_cases() -> None:
    assert cases(RECORDS) == [W1, W2]


def test_tables_have_the_best_first_and_ratios_beside() -> None:
    assert report.rows(RECORDS, W1, "baton") == [
        ("floor", "400", "0.25", "1.00"),
        ("baton", "100", "1.00", "0.25"),
        ("other", "80", "2.00", "0.20"),
    ]
    assert [row[0] for row in report.rows(RECORDS, W2, "baton")] == ["baton", "other"]
    text = report.markdown(RECORDS, "baton", ["a note"])
    assert "| other | 80 | 2.00 | 0.20 |" in text
    assert text.endswith("- a note\n")


def test_the_chart_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.draw(RECORDS, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
