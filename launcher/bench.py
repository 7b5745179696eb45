"""`baton bench`: its commands and their flags. What they measure is imported when it is asked
for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import rich_click as click

from baton.errors import ConfigError
from launcher.cores import spin_briefly


@click.group()
def bench() -> None:
    """Measure."""


@bench.command("engine")
@click.option(
    "--model", type=click.Path(path_type=Path), help="a model directory instead of a shape"
)
@click.option(
    "--shape",
    multiple=True,
    default=("135m",),
    show_default=True,
    type=click.Choice(["demo", "135m", "0.5b"]),
    help="the demo model, or a random Llama of this size; may be given several times",
)
@click.option(
    "--dtype",
    multiple=True,
    default=("bfloat16",),
    show_default=True,
    help="number format of the weights; may be given several times",
)
@click.option("--threads", type=click.IntRange(0), default=0, help="all cores if 0")
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="times that each pass is run; medians count",
)
@click.option(
    "--kv-memory",
    type=click.IntRange(1),
    default=3 * 2**30,
    show_default=True,
    help="bytes of KV cache; passes that need more are left out",
)
@click.option(
    "--compare",
    multiple=True,
    default=("transformers",),
    show_default=True,
    type=click.Choice(["transformers", "torch", "none"]),
    help="transformers: its steps beside ours; torch: plain torch beside the compiled backend",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="steps of generation beside transformers",
)
@click.option("--plots/--no-plots", default=True, show_default=True, help="draw PNG files")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="folder for results.json, tables.md and the plots",
)
@click.option(
    "--profile",
    type=click.Path(dir_okay=False, path_type=Path),
    help="write the cost model of the first model and format here, for the simulator",
)
def bench_engine(**options: Any) -> None:
    """Time passes of the engine alone, over tokens, batch and context.

    Beside each stands how near that is to what this machine can do: bytes moved over the measured
    read bandwidth (MBU), operations over the measured peak of matrix products (MFU). Fits the
    simulator's cost model, too.
    """
    spin_briefly()  # as the workers do
    from engine.bench.command import Options, run

    run(Options(**options))


@bench.command("policies")
@click.option("--only", help="comma-separated names, such as B1,B5; all of them if not given")
@click.option(
    "--engine",
    type=click.Choice(["real", "simulator", "both"]),
    default="both",
    show_default=True,
    help="real: torch runs a small random model here; simulator: a cost model of an A100 or H200",
)
@click.option(
    "--seeds", type=click.IntRange(0, 100), default=0, help="runs per point; 4, or 2 if quick"
)
@click.option("--quick", is_flag=True, help="small sizes: minutes, but wide intervals")
@click.option("--plots/--no-plots", default=True, show_default=True, help="draw PNG files")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="folder for results.json and the plots",
)
def bench_policies(**options: Any) -> None:
    """Measure scheduling policies against each other: the experiments of docs/experiments.md."""
    if importlib.util.find_spec("experiments") is None:
        raise ConfigError("the experiments are part of the source tree only: not of the image")
    from experiments.command import Options, run

    run(Options(**options))
