from __future__ import annotations

import os
from pathlib import Path

import pytest

from baton import cores


def test_a_version_2_quota_is_read_in_cores(tmp_path: Path):
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cores.quota(tmp_path) == 1.5


def test_a_version_1_quota_is_read_in_cores(tmp_path: Path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("400000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.quota(tmp_path) == 4


@pytest.mark.parametrize("limit", ["max 100000", ""])
def test_no_limit_is_none(tmp_path: Path, limit: str):
    (tmp_path / "cpu.max").write_text(limit)
    assert cores.quota(tmp_path) is None


def test_a_quota_below_one_core_is_still_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cores, "quota", lambda: 0.5)
    assert cores.available() == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_affinity_limits_the_cores():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert cores.available() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_hardware_threads_of_one_core_count_once(tmp_path: Path):
    for cpu, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings)
    assert cores.distinct({0, 1, 2, 3}, tmp_path) == 2
    assert cores.distinct({1, 2}, tmp_path) == 2
    assert cores.distinct({0, 2}, tmp_path) == 1
    assert cores.distinct({0, 1, 9}, tmp_path) == 3  # nothing is known of 9


@pytest.mark.parametrize(
    ("available", "workers", "threads"), [(8, 2, 4), (2, 2, 1), (1, 4, 1), (7, 2, 3), (4, 0, 4)]
)
def test_cores_are_shared_out_and_nobody_gets_none(available: int, workers: int, threads: int):
    assert cores.share(available, workers) == threads
