"""Choosing tokens in the compiled backend beside torch's sampler.

    python -m benchmarks.sampling [--threads 1] [--rounds 9] [--out DIR]

Both get the same logits, normal with a standard deviation of 3 (0.5 where they are called flat),
and take turns. Timed from the logits of all rows to tokens in Python: what a step adds to its pass
when no request wants penalties or logprobs. Processor time of all threads, in medians: what others
on the machine do to the clock on the wall is left out.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from torch import Tensor

from baton.types import Request, Sampling, Stopping
from engine.bench.records import Record, Setup, plain, save
from engine.bench.tables import Table
from engine.model.sampler import Choice, choose
from engine.native.library import Library, load
from engine.native.sampling import CompiledChoice
from scheduling.sequence import Sequence

VOCABULARIES = (49_152, 151_936)
BATCHES = (1, 8, 32)
SETTINGS: dict[str, tuple[float, dict[str, Any]]] = {  # spread of the logits, and what is asked for
    "temperature": (3.0, {}),
    "top_k 50": (3.0, {"top_k": 50}),
    "top_p 0.9": (3.0, {"top_p": 0.9}),
    "top_p 0.9, flat logits": (0.5, {"top_p": 0.9}),
    "min_p 0.05": (3.0, {"min_p": 0.05}),
    "top_k 50, top_p 0.9, min_p 0.02": (3.0, {"top_k": 50, "top_p": 0.9, "min_p": 0.02}),
}


def sequences(count: int, settings: dict[str, Any]) -> list[Sequence]:
    """Sequences of one prompt token each."""
    return [
        Sequence.start(
            Request(
                str(row),
                (0,),
                Sampling(temperature=0.8, seed=row, **settings),
                Stopping(max_tokens=1),
            ),
            0,
            now=0.0,
        )
        for row in range(count)
    ]


def race(
    choices: dict[str, Choice], logits: Tensor, batch: list[Sequence], rounds: int
) -> dict[str, float]:
    """Median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in choices}
    for turn in range(rounds + 1):
        for name, choice in choices.items():
            started = time.process_time()
            choice(logits, batch)
            if turn:  # the first one warms up
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(library: Library, threads: int, rounds: int) -> list[Record]:
    """All settings, vocabularies and batches."""
    team = library.functions.baton_team_new(threads, None)
    functions = library.functions
    choices: dict[str, Choice] = {
        "torch": choose,
        "compiled": CompiledChoice(
            lambda draws: library.check(functions.baton_sample(team, library.isa, draws)),
            lambda reports: library.check(functions.baton_report(team, library.isa, reports)),
        ),
    }
    noise = torch.Generator().manual_seed(0)
    records: list[Record] = []
    for vocabulary in VOCABULARIES:
        normal = torch.randn(max(BATCHES), vocabulary, generator=noise)
        for batch in BATCHES:
            for name, (spread, settings) in SETTINGS.items():
                logits = normal[:batch] * spread
                found = race(choices, logits, sequences(batch, settings), rounds)
                for backend, seconds in found.items():
                    setup = Setup("baton", backend, str(vocabulary), "float32", threads)
                    records += plain(setup, "sampling", {name: seconds}, tokens=batch, batch=batch)
    library.functions.baton_team_free(team)
    return records


@click.command()
@click.option("--threads", default=1, show_default=True, help="threads of each")
@click.option("--rounds", default=9, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="folder for sampling.json")
def main(threads: int, rounds: int, out: Path | None) -> None:
    """Time both samplers."""
    library = load()
    if library is None:
        raise click.ClickException("the compiled backend was not built")
    torch.set_num_threads(threads)
    records = measure(library, threads, rounds)
    Console(width=110).print(table(records).rich())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        save(out / "sampling.json", records)


def table(records: list[Record]) -> Table:
    """A row for each vocabulary, setting and batch."""
    rows: dict[tuple[str, str, int, int], dict[str, float]] = {}
    for record in records:
        place = (record.model, record.metric, record.batch, record.threads)
        rows.setdefault(place, {})[record.backend] = record.value
    body = [
        (
            *(f"{int(vocabulary):,}", setting, str(batch), str(threads)),
            *(f"{found['torch'] * 1e3:.2f}", f"{found['compiled'] * 1e3:.2f}"),
            f"{found['torch'] / found['compiled']:.0f}",
        )
        for (vocabulary, setting, batch, threads), found in rows.items()
    ]
    header = ("vocabulary", "sampling", "batch", "threads", "torch, ms", "compiled, ms", "ratio")
    return Table("From logits to tokens", header, body, names=2)


if __name__ == "__main__":
    main()
