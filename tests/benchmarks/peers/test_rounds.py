"""Systems run in turn; one that fails is left out and the others go on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.peers.process import Output, Peer
from benchmarks.peers.registry import System
from benchmarks.peers.rounds import Comparison, Matter, agreement, compare, measures
from benchmarks.peers.workloads import Ask, Workload

FAKE = Path(__file__).parent / "fake_system.py"
BATCH = Workload("w1", (Ask((5, 6), 3), Ask((5,), 2)))
STREAM = Workload("w2", (Ask((5, 6), 3),))
WARM_UP = Workload("warm-up", (Ask((5,), 1),))


def run(tmp_path: Path, *systems: System, rounds: int = 2) -> tuple[Comparison, list[str]]:
    matter = Matter(
        shape="tiny",
        precision="bf16",
        directory=tmp_path,
        cache=tmp_path,
        threads=1,
        max_tokens=512,
        max_sequences=64,
        context=64,
    )
    found, order = Comparison(), []
    compare(
        matter,
        systems,
        (BATCH, STREAM),
        WARM_UP,
        rounds=rounds,
        start=lambda system: Peer([sys.executable, FAKE, system.script], tmp_path / system.name),
        before_round=lambda number: order.append(f"round {number}"),
        into=found,
        say=order.append,
    )
    return found, order


def test_every_round_runs_every_workload_on_every_system_in_turn(tmp_path: Path) -> None:
    found, order = run(tmp_path, System("baton", "ok"), System("other", "ok"))
    assert order[2:] == [
        "round 0",
        "tiny bf16 w1: baton",
        "tiny bf16 w1: other",
        "tiny bf16 w2: baton",
        "tiny bf16 w2: other",
        "round 1",
        "tiny bf16 w1: other",
        "tiny bf16 w1: baton",
        "tiny bf16 w2: other",
        "tiny bf16 w2: baton",
    ]
    assert not found.failures
    metrics = {(r.system, r.workload, r.metric, r.round) for r in found.records}
    for system in ("baton", "other"):
        for number in range(2):
            assert (system, "w1", "output_tokens_per_s", number) in metrics
            assert (system, "w2", "ttft_s", number) in metrics
            assert (system, "w2", "tpot_s", number) in metrics
            assert (system, "w1", "processor_s", number) in metrics
    (same,) = [r.value for r in found.records if r.metric == "agreement" and r.workload == "w1"]
    assert same == 1.0


def test_a_system_that_fails_is_left_out_with_its_reason(tmp_path: Path) -> None:
    systems = (System("bad", "broken"), System("worse", "short"), System("good", "ok"))
    found, _ = run(tmp_path, *systems, rounds=1)
    assert found.failures == {
        "bad, tiny bf16": "ValueError: no bf16 here",
        "worse, tiny bf16": "request 0 got 0 tokens, not 1",
    }
    assert {record.system for record in found.records} == {"good"}


def test_a_precision_that_a_system_has_not_is_no_failure(tmp_path: Path) -> None:
    found, _ = run(tmp_path, System("other", "ok", precisions=("int8",)), rounds=1)
    assert not found.failures
    assert not found.records


def test_many_requests_are_judged_by_throughput_and_one_by_latency() -> None:
    many = [Output((1, 2, 3), 0.5, 2.0), Output((1,), 0.5, 0.5)]
    assert measures(many) == {"output_tokens_per_s": 2.0}
    assert measures([Output((1, 2, 3), 0.5, 2.5)]) == {"ttft_s": 0.5, "tpot_s": 1.0}


def test_agreement_counts_tokens_before_the_first_difference() -> None:
    ours = [Output(tuple(range(20)), 0, 0), Output((1, 2), 0, 0)]
    theirs = [Output((0, 1, 9, 3, *range(4, 20)), 0, 0), Output((1, 2), 0, 0)]
    assert agreement(theirs, ours) == pytest.approx((2 + 2) / (8 + 2))
    assert agreement(ours, ours) == 1.0
