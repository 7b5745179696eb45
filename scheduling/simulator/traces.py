"""Traffic as a file of JSON lines: Baton's own form, and the one that Mooncake publishes.

    {"arrived_at": 0.25, "prompt_tokens": 120, "output_tokens": 80, "max_tokens": 256}
    {"timestamp": 250, "input_length": 120, "output_length": 80}

The first in seconds, the second in milliseconds. `max_tokens`, `tenant`, `priority` and `estimate`
(expected tokens, allotment) may be left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from baton.errors import ConfigError
from baton.types import LengthEstimate
from scheduling.simulator.traffic import Job


def read_jobs(lines: Iterable[str], *, max_tokens: int | None = None) -> list[Job]:
    """The jobs of a trace by arrival, from second 0 on. `max_tokens` is the cap of those that say
    none; without it that is twice the longest output, the same for all.

    Raises ConfigError, with the number of the line, for what is no such trace.
    """
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"line {number} of the trace: {error!r}") from None
    if not rows:
        raise ConfigError("the trace is empty")
    start = min(row["arrived_at"] for row in rows)
    cap = max_tokens or 2 * max(row["output_tokens"] for row in rows)
    rows.sort(key=lambda row: row["arrived_at"])
    return [_job(number, row, start, cap) for number, row in enumerate(rows)]


def job_line(job: Job) -> str:
    """One line of Baton's own form, without its end."""
    row: dict[str, Any] = {
        "arrived_at": job.arrived_at,
        "prompt_tokens": job.prompt_tokens,
        "output_tokens": job.output_tokens,
        "max_tokens": job.max_tokens,
    }
    if job.tenant:
        row["tenant"] = job.tenant
    if job.priority:
        row["priority"] = job.priority
    if job.estimate is not None:
        row["estimate"] = [job.estimate.tokens, job.estimate.allotment]
    return json.dumps(row)


def at_rate(jobs: Sequence[Job], rate: float) -> list[Job]:
    """The same jobs, their arrival times stretched so that `rate` come per second. ValueError if
    they all come at once."""
    span = jobs[-1].arrived_at - jobs[0].arrived_at
    if not span:
        raise ValueError("all jobs come at once: there is no rate to change")
    factor = (len(jobs) - 1) / (rate * span)
    return [replace(job, arrived_at=job.arrived_at * factor) for job in jobs]


def _row(content: dict[str, Any]) -> dict[str, Any]:
    if "timestamp" in content:
        row: dict[str, Any] = {
            "arrived_at": float(content["timestamp"]) / 1000,
            "prompt_tokens": int(content["input_length"]),
            "output_tokens": int(content["output_length"]),
        }
    else:
        row = {
            "arrived_at": float(content["arrived_at"]),
            "prompt_tokens": int(content["prompt_tokens"]),
            "output_tokens": int(content["output_tokens"]),
        }
    if row["prompt_tokens"] < 1 or not math.isfinite(row["arrived_at"]):
        raise ValueError("a prompt without tokens, or no time")
    row["output_tokens"] = max(1, row["output_tokens"])
    for name in ("max_tokens", "tenant", "priority", "estimate"):
        if name in content:
            row[name] = content[name]
    return row


def _job(number: int, row: dict[str, Any], start: float, cap: int) -> Job:
    estimate = row.get("estimate")
    return Job(
        id=f"r{number:07d}",
        arrived_at=row["arrived_at"] - start,
        prompt_tokens=row["prompt_tokens"],
        output_tokens=row["output_tokens"],
        max_tokens=max(row["output_tokens"], int(row.get("max_tokens", cap))),
        estimate=None if estimate is None else LengthEstimate(*map(int, estimate)),
        tenant=str(row.get("tenant", "")),
        priority=int(row.get("priority", 0)),
    )
