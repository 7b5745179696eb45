"""B8, B10, B12, B13 and B15 at tiny sizes: they measure what bars, tables and plots take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments import admission, batching, tokens
from experiments.closed_loop import Stage
from experiments.experiment import Run
from experiments.real import RealEngine, tiny_llama
from experiments.records import EngineName, Results
from experiments.registry import experiment
from scheduling.plan import Capacity
from scheduling.simulator.traffic import Lengths, LogNormal


def measured(name: str, engine: EngineName = "simulator", shared: object = None) -> Results:
    """One seed of an experiment; `shared` as in Run."""
    run = Run(engine, (0,), quick=True)
    if isinstance(shared, dict):
        run.shared.update(shared)
    found = Results()
    found.add(experiment(name).measure(run))
    return found


def assert_shown(name: str, results: Results, folder: Path, bars: int) -> None:
    """Every bar finds its value, tables are full, the plot is drawn."""
    made = experiment(name)
    found = made.bars(results)
    assert len(found) == bars
    assert all(0 < bar.value < 1000 for bar in found)
    tables = made.tables(results)
    assert tables
    for table in tables:
        assert table.rows
        assert all(len(row) == len(table.header) for row in table.rows)
        assert "nan" not in str(table.rows)
    (path,) = made.draw(results, folder)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def llama() -> Iterator[RealEngine]:
    threads = torch.get_num_threads()
    capacity = Capacity(blocks=256, block_size=16, max_tokens=64, max_sequences=16, max_context=128)
    yield tiny_llama(layers=1, hidden=32, capacity=capacity)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["B8", "B10", "B12", "B13", "B15"])
def test_without_results_nothing_is_shown(name: str, tmp_path: Path) -> None:
    made, nothing = experiment(name), Results()
    assert (made.bars(nothing), made.draw(nothing, tmp_path)) == ([], [])
    assert made.tables(nothing) == []


def test_admission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_WARM", 100)
    monkeypatch.setattr(admission, "ONLINE_LOADS", (0.5, 0.9))
    results = measured("B8")
    assert set(results.where(metric="tokens_per_s").distinct("policy")) == {
        way.label for way in admission.WAYS
    }
    goods = results.where(metric="goodput_per_s", load=0.9)
    assert len(goods) == 4
    # Nobody who reserves the longest output is ever thrown out; who reserves nothing is.
    assert results.value(policy="reserve-max", load=0.9, metric="preemptions") == 0
    assert (results.value(policy="paged", metric="peak_kv_tokens") or 0) > (
        results.value(policy="reserve-max", metric="peak_kv_tokens") or 0
    )
    assert_shown("B8", results, tmp_path, bars=3)


def test_splitfuse_in_the_simulator(tmp_path: Path) -> None:
    results = measured("B10")
    # A whole prompt of 2600 tokens holds up every other sequence.
    ratio = results.value(policy="prefill-first / splitfuse", at=1536, metric="p95_gap_s_ratio")
    assert ratio is not None
    assert ratio > 1
    assert_shown("B10", results, tmp_path, bars=2)


def test_splitfuse_on_a_real_engine(llama: RealEngine, tmp_path: Path) -> None:
    stage = Stage(llama, llama.cost, scale=64, requests=20)
    results = measured("B10", "real", {"closed loop": stage})
    assert_shown("B10", results, tmp_path, bars=2)


def test_tokens_of_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_FIXED", (32, 64))
    monkeypatch.setattr(tokens, "_SIZES", (1, 16, 64))
    results = measured("B12", "real")
    alone = results.where(metric="beside_one_sequence", at=1)
    assert [record.value for record in alone] == [1.0, 1.0]
    assert_shown("B12", results, tmp_path, bars=1)


def test_a_pass_of_several_prompts_has_the_tokens_it_should_have() -> None:
    plan = tokens.pass_of(128, 8)
    assert (plan.tokens, len(plan.chunks)) == (128, 8)
    blocks = [block for chunk in plan.chunks for block in chunk.sequence.blocks]
    assert len(blocks) == len(set(blocks))


def test_balancing(tmp_path: Path) -> None:
    results = measured("B13")
    rates = {r.at: r.value for r in results.where(policy="round-robin", metric="requests_per_s")}
    assert rates.keys() == {1, 2, 4, 8}
    assert rates[8] > 4 * rates[1]
    assert_shown("B13", results, tmp_path, bars=5)


def test_batching_in_the_simulator(tmp_path: Path) -> None:
    results = measured("B15")
    ratio = results.value(at=batching.BATCH, metric="requests_per_s_ratio")
    assert ratio is not None
    assert ratio > 1, "slots of a static batch stay empty until its longest output ends"
    assert_shown("B15", results, tmp_path, bars=1)


def test_batching_on_a_real_engine(llama: RealEngine, tmp_path: Path) -> None:
    lengths = Lengths("short", LogNormal(12, 0.0), LogNormal(8, 1.0), 12, 60)
    place = batching._Place(llama, lengths, batches=(4, 16), requests=16)
    results = measured("B15", "real", {("B15", "real"): place})
    ways = results.where(metric="mean_jct_s").distinct("policy")
    assert set(ways) == {"static", "dynamic", "continuous"}
    assert_shown("B15", results, tmp_path, bars=1)
