from pathlib import Path

import pytest

from experiments.records import Record, Results
from experiments.stats import Interval


def record(policy: str = "fcfs", value: float = 1.0, load: float | None = 0.9) -> Record:
    found = Interval(value, value - 0.5, value + 0.5, 4)
    return Record.of("B1", "simulator", policy, "mean_jct_s", found, load=load)


def test_a_record_has_the_interval_of_its_estimate() -> None:
    made = record(value=2.0)
    assert (made.value, made.ci_low, made.ci_high, made.seeds) == (2.0, 1.5, 2.5, 4)


def test_results_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    results = Results([record(), record("mlfq", 3.0), record(load=None)])
    results.save(tmp_path / "results.json")
    assert list(Results.load(tmp_path / "results.json")) == list(results)


def test_no_results_are_a_file_too(tmp_path: Path) -> None:
    Results().save(tmp_path / "results.json")
    assert len(Results.load(tmp_path / "results.json")) == 0


def test_records_are_found_by_any_field() -> None:
    results = Results([record(), record("mlfq", 3.0), record(value=7.0, load=0.5)])
    assert results.value(policy="mlfq") == 3.0
    assert results.value(policy="fcfs", load=0.5) == 7.0
    assert results.value(policy="srpt-oracle") is None
    assert results.distinct("policy") == ["fcfs", "mlfq"]


def test_a_value_of_several_records_is_refused() -> None:
    with pytest.raises(ValueError, match="2 records"):
        Results([record(), record()]).value(policy="fcfs")
