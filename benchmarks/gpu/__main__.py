"""MBU, MFU, step times and kernels on this GPU, and output tokens per second beside transformers.

    python -m benchmarks.gpu [--shapes llama-3-8b] [--formats none,int8,int4] [--only passes]
        [--out docs/performance/gpu]
    python -m benchmarks.gpu tune
    python -m benchmarks.gpu report

Models have random weights and are made on the device; nothing is read or written but --out.
Ceilings are measured in the same run. --out keeps flat records, a file per device, section by
section: what a run does not measure stays as it was. A section that fails is reported, and the
others go on.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from benchmarks.gpu import problems, tune
from benchmarks.gpu import report as reports
from benchmarks.gpu.bars import judged
from benchmarks.gpu.models import SHAPES, give_back
from benchmarks.gpu.records import Source, save
from benchmarks.gpu.sections import KV, PARTS, Bench
from benchmarks.gpu.timing import seconds

_ROOT = Path(__file__).parents[2]
_FORMATS = ("none", "int8", "int4", "fp8")


class Names(click.ParamType):  # type: ignore[type-arg]
    """Names with commas between them, of those that there are."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self._known = known

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """As click does."""
        found = tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        for each in found:
            if each not in self._known:
                self.fail(f"{each} is none of {', '.join(self._known)}", param, ctx)
        return found


@click.group(invoke_without_command=True)
@click.option("--shapes", type=Names(tuple(SHAPES)), default="llama-3-8b", show_default=True)
@click.option("--formats", type=Names(_FORMATS), default="none,int8,int4", show_default=True)
@click.option("--kv", type=click.Choice(list(KV)), default="auto", show_default=True)
@click.option("--only", type=Names(PARTS), default=",".join(PARTS), show_default=True)
@click.option(
    "--tensor-parallel",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="passes on so many devices beside one, too",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--minutes", type=float, help="begin no section after so many")
@click.option("--quick", is_flag=True, help="tiny sizes, to try the benchmark itself")
@click.option("--device", default="cuda", show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="for the records")
@click.pass_context
def main(context: click.Context, /, device: str, **options: Any) -> None:
    """Measure and print. Exits with 1 if a section fails."""
    if context.invoked_subcommand is None:
        _bench(_device(device), **options)


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            "torch sees no CUDA device. To try the benchmark itself: TRITON_INTERPRET=1 python -m "
            "benchmarks.gpu --device cpu --shapes tiny --quick --rounds 1"
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise click.ClickException("on a CPU kernels need TRITON_INTERPRET=1")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def _bench(
    device: torch.device,
    *,
    rounds: int,
    minutes: float | None,
    quick: bool,
    out: Path | None,
    **wanted: Any,
) -> None:
    """`wanted` as of `_sections`."""
    console, source = Console(width=100), Source.here(device)
    begun = time.monotonic()
    bench = Bench(console, device, source, quick=quick)
    troubles: list[str] = []
    bench.ceilings()
    for name, run in _sections(bench, rounds, **wanted):
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            troubles.append(f"{name}: left out, {minutes:g} minutes are over")
            continue
        try:
            run()
        except Exception as error:
            console.print(traceback.format_exc(), markup=False, highlight=False)
            troubles.append(f"{name}: {type(error).__name__}: {error}")
        give_back(device)
        if out is not None:
            save(out / source.file, bench.records)
        console.print(f"[dim]{name}: done after {time.monotonic() - begun:.0f} s in all[/dim]")
    for verdict in judged(bench.records) if device.type == "cuda" else ():
        console.print(verdict.text, markup=False, highlight=False, soft_wrap=True)
    for trouble in troubles:
        console.print(f"TROUBLE  {trouble}", markup=False, highlight=False, soft_wrap=True)
    if troubles:
        raise SystemExit(1)


def _sections(
    bench: Bench,
    rounds: int,
    *,
    shapes: tuple[str, ...],
    formats: tuple[str, ...],
    kv: str,
    only: tuple[str, ...],
    tensor_parallel: int,
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is to be measured, by name, in order."""
    for name, run in (
        ("kernels", bench.kernels),
        ("attention", bench.attention),
        ("handoff", bench.handoff),
    ):
        if name in only:
            yield name, run
    for shape in shapes:
        if "passes" in only:
            for form in formats:
                yield f"{shape}, {form}", partial(bench.passes, shape, form, kv)
        if tensor_parallel > 1:
            yield f"{shape}, shards", partial(bench.parallel, shape, tensor_parallel)
        if "serving" in only:
            yield f"{shape}, serving", partial(bench.serving, shape, rounds)


@main.command("tune")
@click.option("--device", default="cuda", show_default=True)
@click.option("--only", help="names of calls that begin so, with commas between them")
@click.option("--minutes", type=float, default=9.0, show_default=True)
@click.option("--again", is_flag=True, help="also what was tuned before")
def tune_command(device: str, only: str | None, minutes: float, again: bool) -> None:
    """Measure tile sizes, and write engine/gpu/tuned/DEVICE.json."""
    place = _device(device)
    if place.type != "cuda":
        raise click.ClickException("tile sizes are those of a GPU")
    file, ends = tune.device_file(place), time.monotonic() + 60 * minutes
    known = tune.read(file)
    begins = tuple((only or "").split(","))
    for lot in problems.lots(place):
        if time.monotonic() > ends:
            break
        calls = {name: call for name, call in lot.items() if name.startswith(begins)}
        trial = tune.Trial({} if again else {kernel: dict(keys) for kernel, keys in known.items()})
        tune.tune(
            calls,
            trial,
            lambda call: seconds(call, place, repeats=10),
            click.echo,
            lambda: time.monotonic() < ends,
        )
        for kernel, keys in trial.known.items():
            known.setdefault(kernel, {}).update(keys)
        tune.write(file, known)
        give_back(place)
    click.echo(f"written: {file}")


@main.command("report")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    default=_ROOT / "docs" / "performance" / "gpu",
    show_default="docs/performance/gpu",
)
@click.option(
    "--page",
    type=click.Path(exists=True, path_type=Path),
    default=_ROOT / "docs" / "gpu.md",
    show_default="docs/gpu.md",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    default=_ROOT / "docs" / "img" / "gpu.png",
    show_default="docs/img/gpu.png",
)
def report_command(results: Path, page: Path, plot: Path) -> None:
    """Put the tables of what was measured into the page, and draw the plot."""
    records = reports.all_records(results)
    page.write_text(reports.fill(page.read_text(), records, plot.name if records else ""))
    if records:
        reports.draw(records, plot)


if __name__ == "__main__":
    main()
