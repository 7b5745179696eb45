"""FAIR with far too few jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.experiment import Run
from experiments.records import Record, Results
from experiments.registry import experiment
from experiments.stats import interval

FAIR = experiment("FAIR")


@pytest.fixture(scope="module")
def results() -> Results:
    return Results(FAIR.measure(Run("simulator", (0,), quick=True)))


@pytest.mark.parametrize("policy", ["predicted-srpt", "skip-join-mlfq"])
def test_shares_keep_a_flood_from_the_others(policy: str, results: Results) -> None:
    def ttft(label: str) -> float:
        found = results.value(policy=label, metric="p95_ttft_s", at=10.0)
        assert found is not None
        return found

    assert 10 * ttft(policy) < ttft(f"{policy}, one tenant")
    assert 3 * ttft(f"{policy}, none ahead") < ttft(f"{policy}, one tenant")


def test_without_a_flood_shares_change_nothing(results: Results) -> None:
    for metric in ("p95_ttft_s", "mean_jct_s"):
        found = results.where(metric=metric, at=0.7)
        assert len(found) == 6
        assert len({record.value for record in found}) == 1  # nobody ever waits


def test_it_draws_and_tabulates(results: Results, tmp_path: Path) -> None:
    tables = FAIR.tables(results)
    assert [table.header for table in tables] == [
        ("order", "no flood", *(f"{at} times its share" for at in (2, 5, 10)))
    ] * 3
    assert all(len(table.rows) == 6 for table in tables)
    [path] = FAIR.draw(results, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert FAIR.draw(Results(), tmp_path) == FAIR.tables(Results()) == []


def test_the_bar_is_the_calm_tenants_wait_beside_that_without_a_flood() -> None:
    def told(value: float, at: float) -> Record:
        pair = "predicted-srpt / predicted-srpt"
        return Record.of(
            "FAIR", "simulator", pair, "p95_ttft_s_ratio", interval([value]), axis="flood", at=at
        )

    [bar] = FAIR.bars(Results([told(1.5, 5.0), told(3.0, 10.0)]))
    assert (bar.value, bar.met) == (1.5, True)
