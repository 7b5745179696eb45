"""Step time of the engine, beside transformers and as a cost model: `baton bench engine`.

Runs the demo model and a random Llama of SmolLM-135M's shape, with 1, 8 and 32 sequences.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import demo_model
from engine.bench.beside import Row, measure
from engine.bench.models import random_llama
from engine.fit import Fit, fit
from engine.model.load import load_executor

HOST_KV_MEMORY = 64 * 2**20


@click.command()
@click.option("--steps", default=20, show_default=True, help="generation steps per measurement")
@click.option("--context", default=128, show_default=True, help="tokens of each prompt")
@click.option("--threads", default=0, help="torch threads; all cores if 0")
@click.option("--batch", "batches", multiple=True, default=(1, 8, 32), show_default=True, type=int)
@click.option(
    "--dtype", "dtypes", multiple=True, default=("bfloat16", "float32"), show_default=True
)
@click.option("--model", type=click.Path(path_type=Path), help="a model directory instead of both")
@click.option("--compare/--no-compare", default=True, help="beside transformers, or the fit only")
@click.option("--json", "file", type=click.Path(path_type=Path), help="also write the rows here")
@click.option("--plot", type=click.Path(path_type=Path), help="also draw them here, as a PNG")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="also write the cost model of the first model and dtype here, for the simulator",
)
def main(
    steps: int,
    context: int,
    threads: int,
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    model: Path | None,
    compare: bool,
    file: Path | None,
    plot: Path | None,
    profile: Path | None,
) -> None:
    """Time generation steps of the engine and of transformers, in turn; then passes of many
    shapes, and fit the simulator's cost model to them."""
    console = Console(stderr=True)
    logging.disable_progress_bar()
    rows: list[Row] = []
    fits: list[Fit] = []
    with tempfile.TemporaryDirectory() as directory, console.status("") as status:
        for path, name in models(model, Path(directory), status.update):
            for dtype in dtypes if compare else ():
                rows += measure(
                    path,
                    name,
                    dtype,
                    batches=batches,
                    context=context,
                    steps=steps,
                    threads=threads,
                    progress=status.update,
                )
            fits.append(fit_of(path, name, dtypes[0], threads, status.update))
    if rows:
        Console().print(table(rows))
    Console().print(costs(fits))
    if file is not None:
        made = [
            asdict(row) | {"tokens_per_second": row.tokens_per_second, "ratio": row.ratio}
            for row in rows
        ]
        file.write_text(json.dumps(made, indent=2) + "\n")
    if plot is not None:
        draw(rows, plot)
    if profile is not None:
        fits[0].profile.save(profile)


def models(
    chosen: Path | None, directory: Path, progress: Callable[[str], None]
) -> list[tuple[Path, str]]:
    """The directories and names of what is measured."""
    if chosen is not None:
        return [(chosen, chosen.name)]
    progress("making a random Llama of 135M parameters")
    random_llama(directory)
    return [(demo_model.path(), "demo"), (directory, "random 135M")]


def fit_of(path: Path, name: str, dtype: str, threads: int, progress: Callable[[str], None]) -> Fit:
    """The cost model of one model."""
    executor = load_executor(path, dtype=dtype, threads=threads, host_kv_memory=HOST_KV_MEMORY)
    try:
        return fit(executor, f"{name} {dtype}", progress=progress)
    finally:
        executor.close()


def costs(fits: list[Fit]) -> Table:
    """The cost models as people read them."""
    result = Table(title="Cost of a pass, and of swapping a KV block")
    result.add_column("")
    for one in fits:
        result.add_column(one.profile.name, justify="right", no_wrap=True)
    rows: dict[str, Callable[[Fit], str]] = {
        "base, ms": lambda fit: f"{fit.profile.base * 1e3:.2f}",
        "per prompt token, us": lambda fit: f"{fit.profile.per_token * 1e6:.1f}",
        "per token and attended position, ns": lambda fit: f"{fit.profile.per_attention * 1e9:.1f}",
        "per generating sequence, us": lambda fit: f"{fit.profile.per_sequence * 1e6:.1f}",
        "per position of context, ns": lambda fit: f"{fit.profile.per_context * 1e9:.1f}",
        "median error": lambda fit: f"{fit.median_error:.1%}",
        "block to the host or back, us": lambda fit: (
            f"{fit.profile.swap_seconds_per_block * 1e6:.1f}"
        ),
        "GB/s": lambda fit: (
            f"{fit.profile.block_bytes / fit.profile.swap_seconds_per_block / 1e9:.1f}"
        ),
    }
    for heading, cell in rows.items():
        result.add_row(heading, *map(cell, fits))
    return result


def draw(rows: list[Row], file: Path) -> None:
    """Tokens per second over the batch size, a panel per model, ours beside transformers'."""
    from matplotlib import pyplot

    models = list(dict.fromkeys(row.model for row in rows))
    figure, panels = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        for dtype, colour in (("bfloat16", "tab:blue"), ("float32", "tab:orange")):
            chosen = [row for row in rows if (row.model, row.dtype) == (model, dtype)]
            batches = [row.batch for row in chosen]
            ours = [row.tokens_per_second for row in chosen]
            theirs = [row.batch / row.reference_step for row in chosen]
            panel.plot(batches, ours, "o-", color=colour, label=f"Baton, {dtype}")
            panel.plot(batches, theirs, "s--", color=colour, label=f"transformers, {dtype}")
        panel.set(title=model, xlabel="sequences", ylabel="tokens per second", ylim=(0, None))
        panel.set_xscale("log", base=2)
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def table(rows: list[Row]) -> Table:
    """The rows as people read them."""
    result = Table(title=f"Generation steps beside transformers, {torch.get_num_threads()} threads")
    result.add_column("model", no_wrap=True)
    result.add_column("dtype", no_wrap=True)
    for heading in ("batch", "step ms", "tokens/s", "theirs ms", "ratio", "prefill ms"):
        result.add_column(heading, justify="right")
    for row in rows:
        result.add_row(
            row.model,
            row.dtype,
            str(row.batch),
            f"{row.step * 1e3:.1f}",
            f"{row.tokens_per_second:.0f}",
            f"{row.reference_step * 1e3:.1f}",
            f"{row.ratio:.2f}",
            f"{row.prefill * 1e3:.1f}",
        )
    return result


if __name__ == "__main__":
    main()
