"""How long a decode worker takes to be ready, and what it then holds in memory.

    python -m benchmarks.startup [--model DIR | --shape 135m] [--rounds 3] [--out DIR]

Starts `baton decode` processes, one after the other, each beside a Redis of its own. Memory is the
process's resident size: when it says that it serves, and at its highest after a burst that fills
most of the KV cache. The phases are timed in a fresh process, without a worker around them.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from baton import cores
from benchmarks.decode_client import take
from engine.bench.models import SHAPES, given_or_random
from engine.bench.records import Record, Setup, plain, save
from engine.bench.tables import Table
from launcher.health import until_serving
from launcher.plan import free_ports
from queueing.embedded import EmbeddedRedis

PHASES = """
import json, pathlib, sys, time
started = time.perf_counter()
from engine.bench.backends import backend_of, load
imported = time.perf_counter()
model, dtype, kv_memory, threads = sys.argv[1:]
sizes = {"kv_memory": int(kv_memory), "threads": int(threads)}
executor = load(pathlib.Path(model), "auto", dtype=dtype, **sizes)
loaded = time.perf_counter()
executor.warm_up()
warm = time.perf_counter()
print(json.dumps({
    "backend": backend_of(executor),
    "kv_bytes": executor.capacity.blocks * executor.pool.block_bytes,
    "import_seconds": imported - started,
    "load_seconds": loaded - imported,
    "warm_up_seconds": warm - loaded,
}))
"""
BURST = {"sequences": 32, "prompt": 512, "tokens": 32}
READY_SECONDS = 120.0
# Redis has never heard of the burst's requests: a report of them would end them.
UNREPORTED = ["--report-interval=60", "--worker-ttl=300"]


@click.command()
@click.option("--rounds", default=3, show_default=True, help="processes; medians count")
@click.option("--threads", default=0, help="threads of the model; all cores if 0")
@click.option("--dtype", default="bfloat16", show_default=True)
@click.option("--kv-memory", default=512 * 2**20, show_default=True, help="bytes of KV cache")
@click.option("--shape", default="135m", show_default=True, type=click.Choice(list(SHAPES)))
@click.option("--model", type=click.Path(path_type=Path), help="a model directory instead")
@click.option("--out", type=click.Path(path_type=Path), help="folder for startup.json")
def main(**options: Any) -> None:
    """Start decode workers, and say how long it took and what they hold."""
    with given_or_random(options["model"], options["shape"]) as (path, name):
        rounds = []
        for _ in range(options["rounds"]):
            rounds.append(phases(path, options) | asyncio.run(start(path, options)))
        records = report(path, name, options, rounds)
    Console(width=110).print(table(records).rich())
    if options["out"] is not None:
        options["out"].mkdir(parents=True, exist_ok=True)
        save(options["out"] / "startup.json", records)


def phases(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each phase in a fresh process."""
    arguments = [str(path), options["dtype"], str(options["kv_memory"]), str(threads(options))]
    done = subprocess.run(
        [sys.executable, "-c", PHASES, *arguments], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


async def start(path: Path, options: dict[str, Any]) -> dict[str, float]:
    """One worker process: seconds until it serves, and its resident bytes then and at most."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    async with await EmbeddedRedis.start() as redis:
        command = [sys.executable, "-m", "launcher", "decode", f"--model={path}"]
        command += [f"--address={address}", f"--kv-memory={options['kv_memory']}"]
        command += [f"--threads={threads(options)}", *formats(options["dtype"])]
        command += UNREPORTED
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *command,
            env=os.environ | {"BATON_REDIS_URL": redis.url},
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(READY_SECONDS):
                await until_serving(address)
            ready = time.perf_counter() - began
            resident = memory(process.pid)
            await take(address, BURST["sequences"], BURST["prompt"], BURST["tokens"], 0.0)
            most = memory(process.pid)
        finally:
            process.terminate()
            await process.wait()
    found = {"ready_seconds": ready, "ready_resident_bytes": resident["VmRSS"]}
    return found | {"busy_resident_bytes": most["VmRSS"], "peak_resident_bytes": most["VmHWM"]}


def threads(options: dict[str, Any]) -> int:
    """As many as there are cores unless told otherwise."""
    return options["threads"] or cores.available()


def formats(dtype: str) -> list[str]:
    """Flags for the format of the weights."""
    if dtype in ("int8", "int4"):
        return ["--dtype=bfloat16", f"--quantization={dtype}"]
    return [f"--dtype={dtype}"]


def memory(pid: int) -> dict[str, float]:
    """The kernel's account of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {
        name: int(value.split()[0]) * 1024.0
        for name, _, value in (line.partition(":") for line in lines)
        if name in ("VmRSS", "VmHWM")
    }


def report(
    path: Path, name: str, options: dict[str, Any], rounds: list[dict[str, Any]]
) -> list[Record]:
    """Medians over the rounds. `bound_bytes` is what a worker should stay within: 1.3 of
    the weights as they are stored, the KV pool, and 400 MB."""
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    setup = Setup("baton", rounds[0]["backend"], name, options["dtype"], threads(options))
    names = [key for key in rounds[0] if key != "backend"]
    values = {key: statistics.median(one[key] for one in rounds) for key in names}
    bound = 1.3 * weights + values["kv_bytes"] + 400e6
    return plain(
        setup, "startup", {"weight_bytes": float(weights)} | values | {"bound_bytes": bound}
    )


def table(records: list[Record]) -> Table:
    """A row for each setup."""
    rows: dict[Setup, dict[str, float]] = {}
    for record in records:
        rows.setdefault(record.setup, {})[record.metric] = record.value
    seconds = ("import_seconds", "load_seconds", "warm_up_seconds", "ready_seconds")
    resident = ("ready_resident_bytes", "peak_resident_bytes")
    sizes = ("weight_bytes", "kv_bytes", *resident, "bound_bytes")
    return Table(
        "A decode worker from its start to its first request, and its memory",
        (
            *("model", "precision", "backend", "import, s", "load, s", "warm-up, s", "serving, s"),
            *("weights, MB", "KV pool, MB", "resident, MB", "at most, MB", "bound, MB"),
        ),
        [
            (
                *(setup.model, setup.precision, setup.backend),
                *(f"{values[name]:.2f}" for name in seconds),
                *(f"{values[name] / 1e6:.0f}" for name in sizes),
            )
            for setup, values in rows.items()
        ],
    )


if __name__ == "__main__":
    main()
