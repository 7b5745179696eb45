"""PREFIX with far too few talks."""

from __future__ import annotations

import pytest

from experiments.experiment import Run
from experiments.prefixes import LOADS
from experiments.records import Results
from experiments.registry import experiment

PREFIX = experiment("PREFIX")


@pytest.fixture(scope="module")
def results() -> Results:
    return Results(PREFIX.measure(Run("simulator", (0,), quick=True)))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("shape", ["", ", 2 prefill"])
def test_less_is_computed_where_prompts_go_to_their_beginnings(
    load: float, shape: str, results: Results
) -> None:
    def share(policy: str) -> float:
        found = results.value(policy=policy, metric="computed_share", load=load)
        assert found is not None
        return found

    assert share("no caches") > 0.99
    assert 2 * share(f"prefix-aware{shape}") < share(f"kv-aware{shape}") < 0.5


def test_it_tabulates_and_judges(results: Results) -> None:
    [table] = PREFIX.tables(results)
    assert len(table.rows) == 5 * len(LOADS)
    bars = PREFIX.bars(results)
    assert len(bars) == 2 * len(LOADS)
    assert all(bar.met for bar in bars)
