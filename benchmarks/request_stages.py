"""Where the time of one request goes, with a separate prefill worker and without one.

Two clusters of real processes on this host, asked in turn: client, gateway, Redis, workers. The
speed of a shared machine changes from second to second, and only neighbours compare.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from google.protobuf.duration_pb2 import Duration
from rich.console import Console
from rich.table import Table

import demo_model
from baton.client import Client, Ended
from baton.config import ServeConfig, load
from engine.bench.models import random_llama
from launcher.cluster import LocalCluster

STAGES = ("queue", "prefill", "kv_transfer", "time_to_first_token", "time_per_output_token")


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the rounds, in milliseconds."""

    model: str
    workers: str
    prompt_tokens: int
    queue: float
    prefill: float
    kv_transfer: float
    time_to_first_token: float
    time_per_output_token: float


@click.command()
@click.option("--rounds", default=15, show_default=True, help="requests per setting")
@click.option("--prompt", "prompts", multiple=True, default=(16, 128, 512), type=int)
@click.option("--tokens", default=32, show_default=True, help="output tokens of each request")
@click.option("--json", "file", type=click.Path(path_type=Path), help="also write the rows here")
def main(rounds: int, prompts: tuple[int, ...], tokens: int, file: Path | None) -> None:
    """Time the stages of single requests, one after the other."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        random_llama(Path(directory))
        for name, path in (("demo", demo_model.path()), ("random 135M", Path(directory))):
            rows += asyncio.run(_compare(name, path, prompts, rounds, tokens))
    Console(width=100).print(table(rows))
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


async def _compare(
    name: str, path: Path, prompts: Iterable[int], rounds: int, tokens: int
) -> list[Row]:
    def config(prefill_workers: int) -> ServeConfig:
        options = {"model": path, "address": "127.0.0.1:0", "prefill_workers": prefill_workers}
        return load(ServeConfig, options)

    rows = []
    async with (
        LocalCluster(config(1), _silent) as apart,
        LocalCluster(config(0), _silent) as together,
        Client(apart.address) as first,
        Client(together.address) as second,
    ):
        clients = {"prefill + decode": first, "decode alone": second}
        for prompt in prompts:
            found: dict[str, list[dict[str, float]]] = {workers: [] for workers in clients}
            for index in range(rounds + 2):
                for workers, client in clients.items():
                    stages = await _ask(
                        client, [3 + (index + i) % 999 for i in range(prompt)], tokens
                    )
                    if index >= 2:  # the first ones warm things up
                        found[workers].append(stages)
            for workers, all_stages in found.items():
                medians = {s: statistics.median(one[s] for one in all_stages) for s in STAGES}
                rows.append(Row(name, workers, prompt, **medians))
    return rows


async def _ask(client: Client, prompt: list[int], tokens: int) -> dict[str, float]:
    """Stages of one request, in milliseconds."""
    options = {"max_tokens": tokens, "ignore_eos": True, "timing": True}
    async for event in client.generate(prompt, **options):
        if isinstance(event, Ended):
            timing = event.message.timing
            return {
                "queue": _milliseconds(timing.queue),
                "prefill": _milliseconds(timing.prefill),
                "kv_transfer": _milliseconds(timing.kv_transfer),
                "time_to_first_token": _milliseconds(timing.time_to_first_token),
                "time_per_output_token": _milliseconds(timing.decode) / (tokens - 1),
            }
    raise RuntimeError("the stream ended without Finished")


def _milliseconds(duration: Duration) -> float:
    return duration.seconds * 1e3 + duration.nanos / 1e6


def _silent(name: str, line: str) -> None:
    """Logs of the processes are of no interest here."""


def table(rows: list[Row]) -> Table:
    """The rows as people read them; the ratio is TTFT of the pair over decode alone."""
    result = Table(title="Stages of one request, ms")
    for heading in ("model", "workers"):
        result.add_column(heading, no_wrap=True)
    for heading in ("prompt", "queue", "prefill", "KV", "TTFT", "TPOT", "TTFT ratio"):
        result.add_column(heading, justify="right")
    alone = {
        (row.model, row.prompt_tokens): row.time_to_first_token
        for row in rows
        if row.workers == "decode alone"
    }
    for row in rows:
        result.add_row(
            row.model,
            row.workers,
            str(row.prompt_tokens),
            f"{row.queue:.1f}",
            f"{row.prefill:.1f}",
            f"{row.kv_transfer:.1f}",
            f"{row.time_to_first_token:.1f}",
            f"{row.time_per_output_token:.1f}",
            f"{row.time_to_first_token / alone[row.model, row.prompt_tokens]:.2f}",
        )
    return result


if __name__ == "__main__":
    main()
