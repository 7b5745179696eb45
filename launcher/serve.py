"""`baton serve`: keep a local cluster up until told to stop."""

from __future__ import annotations

import asyncio
import sys

from baton import telemetry
from baton.addresses import require_loopback
from baton.config import ServeConfig
from launcher.cluster import LocalCluster
from launcher.interrupt import interruptible


async def run(config: ServeConfig) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    require_loopback(config.address, insecure_network=config.insecure_network)
    telemetry.start("baton", config)
    await interruptible(_serve(config))
    return 0


async def _serve(config: ServeConfig) -> None:
    async with LocalCluster(config, to_stderr) as cluster:
        print(cluster.ready_line(), flush=True)
        await asyncio.Event().wait()  # until cancelled


def to_stderr(name: str, line: str) -> None:
    """One line of a process's log, under its name."""
    print(f"{name:>9} | {line}", file=sys.stderr, flush=True)
