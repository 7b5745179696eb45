"""How many processor cores this process may use, and how workers share them.

Two processes that each start a thread per core on the same cores are orders of magnitude
slower than two that share them out: their spinning threads wait for each other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")


def available() -> int:
    """Cores by affinity and by the cgroup's quota, at least one."""
    try:
        allowed = distinct(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, int(quota() or allowed)))


def distinct(cpus: Iterable[int], root: Path = _CPUS) -> int:
    """Physical cores among these hardware threads: two threads of one core share its arithmetic
    units, and dense products keep those busy alone."""
    cores = set()
    for cpu in cpus:
        try:
            cores.add((root / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def quota(root: Path = _CGROUPS) -> float | None:
    """Cores that the cgroup (v2, else v1) of this process grants, None for no limit."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if limit in ("max", "-1"):
        return None
    return int(limit) / int(period)


def share(cores: int, workers: int) -> int:
    """Threads for each of `workers` processes on `cores`, at least one."""
    return max(1, cores // max(1, workers))
