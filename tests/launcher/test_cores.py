from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher import cores


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


@pytest.mark.parametrize(
    ("available", "workers", "threads"), [(8, 2, 4), (2, 2, 1), (1, 4, 1), (7, 2, 3), (4, 0, 4)]
)
def test_cores_are_shared_out_and_nobody_gets_none(available: int, workers: int, threads: int):
    assert cores.share(available, workers) == threads


def test_idle_threads_spin_briefly_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
):
    environment: dict[str, str] = {}
    monkeypatch.setattr(cores.os, "environ", environment)
    cores.spin_briefly()
    assert environment == {"GOMP_SPINCOUNT": "1000"}
    for chosen in ({"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "ACTIVE"}):
        environment.clear()
        environment.update(chosen)
        cores.spin_briefly()
        assert environment == chosen
