"""How many processor cores this process may use, and how workers share them.

Two processes that each start a torch thread per core on the same cores are orders of magnitude
slower than two that share them out: their spinning threads wait for each other.
"""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available() -> int:
    """Cores by affinity and by the cgroup's quota, at least one."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, int(quota() or allowed)))


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


def spin_briefly() -> None:
    """Let torch's idle threads spin for a moment only before they sleep, unless the environment
    says otherwise. To be called before torch is imported, which is when OpenMP looks.

    By default they spin for long, and one that has lost its core to another process holds up
    every pass until it gets it back. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) is no better: on
    cores of its own, a pass of one token then takes twice as long (docs/performance.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
