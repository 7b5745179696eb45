"""How the threads that torch keeps on a process's cores wait for work."""

from __future__ import annotations

import os


def spin_briefly() -> None:
    """Let torch's idle threads spin for a moment only before they sleep, unless the environment
    says otherwise. To be called before torch is imported, which is when OpenMP looks.

    By default they spin for long, and one that has lost its core to another process holds up
    every pass until it gets it back. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) is no better: on
    cores of its own, a pass of one token then takes twice as long (docs/performance.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
