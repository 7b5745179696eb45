"""`python -m benchmarks.peers`: installs what is missing, runs, prints ratios, writes results."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import rich_click as click
from rich.console import Console
from rich.table import Table

from baton import cores
from benchmarks.peers import floor, report
from benchmarks.peers.process import Peer
from benchmarks.peers.records import FLOOR, Record, cases, save
from benchmarks.peers.registry import MODES, PEERS, System
from benchmarks.peers.rounds import Comparison, Matter, compare
from benchmarks.peers.shapes import SHAPES, make, vocabulary
from benchmarks.peers.workloads import WORKLOADS, Workload, warm_up
from engine import ceilings
from engine.ceilings import Ceilings

_MAX_TOKENS = 512  # token budget of a pass, of all systems that have one
_MAX_SEQUENCES = 64
_CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class _Options:
    systems: tuple[System, ...]
    workloads: tuple[str, ...]
    rounds: int
    seed: int
    threads: int
    cache: Path
    out: Path

    @property
    def reference(self) -> str:
        """Whom the others are compared with."""
        return self.systems[0].name


def _among(known: Iterable[str]) -> Callable[..., tuple[str, ...]]:
    """Reads names separated by commas; fails for those that are not `known`."""
    names = tuple(known)

    def read(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(name for name in text.split(",") if name))
        for name in chosen:
            if name not in names:
                raise click.BadParameter(f"{name}: there are {', '.join(names)}")
        return chosen

    return read


@click.command()
@click.option(
    "--peers",
    metavar="NAMES",
    callback=_among(PEERS),
    default="openvino,llama.cpp,transformers,vllm",
    show_default=True,
    help="the other engines, by name",
)
@click.option(
    "--modes",
    metavar="NAMES",
    callback=_among(MODES),
    default="in-process,grpc",
    show_default=True,
    help="how Baton runs: in-process, or served over gRPC with and without a prefill worker",
)
@click.option(
    "--shapes",
    metavar="NAMES",
    callback=_among(SHAPES),
    default="135m,0.5b",
    show_default=True,
    help="random Llamas of these sizes",
)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="a model directory instead",
)
@click.option(
    "--precision",
    "precisions",
    metavar="NAMES",
    callback=_among(("bf16", "int8")),
    default="bf16",
    show_default=True,
    help="bf16, int8 or both",
)
@click.option(
    "--workloads",
    metavar="NAMES",
    callback=_among(WORKLOADS),
    default="w1,w2",
    show_default=True,
    help="w1: 64 requests at once; w2: a single one",
)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="of the requests")
@click.option("--threads", type=click.IntRange(0), default=0, help="of each system; all cores if 0")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path.home() / ".cache" / "baton-peers",
    help="environments and converted models are kept here  [default: ~/.cache/baton-peers]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("peers"),
    show_default=True,
    help="folder for results.json, run.json, tables.md and peers.png",
)
def main(
    peers: tuple[str, ...],
    modes: tuple[str, ...],
    shapes: tuple[str, ...],
    model: Path | None,
    precisions: tuple[str, ...],
    workloads: tuple[str, ...],
    rounds: int,
    seed: int,
    threads: int,
    cache: Path,
    out: Path,
) -> None:
    """Serve the same requests with Baton and with other engines, in turn, and compare."""
    ours = tuple(system for mode in modes for system in MODES[mode])
    systems = (*ours, *(PEERS[name] for name in peers))
    if not systems:
        raise click.UsageError("name at least one of --peers and --modes")
    options = _Options(
        systems, workloads, rounds, seed, threads or cores.available(), cache.absolute(), out
    )
    for folder in (out, options.cache / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    console, found = Console(stderr=True), Comparison()
    try:
        for name, directory in _models(options, shapes, model, console):
            for precision in precisions:
                _compare(options, name, directory, precision, found, console)
    finally:
        _write(options, found)
    _show(options, found, console)


def _models(
    options: _Options, shapes: tuple[str, ...], model: Path | None, console: Console
) -> list[tuple[str, Path]]:
    if model is not None:
        return [(model.absolute().name, model.absolute())]
    found = []
    for name in shapes:
        directory = options.cache / "models" / name
        if not (directory / "model.safetensors").is_file():
            with console.status(f"{name}: drawing weights"):
                make(SHAPES[name], directory)
        found.append((name, directory))
    return found


def _compare(
    options: _Options,
    name: str,
    directory: Path,
    precision: str,
    found: Comparison,
    console: Console,
) -> None:
    """One model in one precision: all systems, and the floor under them."""
    tokens = vocabulary(directory)
    chosen = [WORKLOADS[each](tokens, options.seed) for each in options.workloads]
    cache = options.cache / "converted" / directory.name
    cache.mkdir(parents=True, exist_ok=True)
    matter = Matter(
        shape=name,
        precision=precision,
        directory=directory,
        cache=cache,
        threads=options.threads,
        max_tokens=_MAX_TOKENS,
        max_sequences=_MAX_SEQUENCES,
        context=_CONTEXT,
    )
    with console.status("") as status:
        floors = _Floors(matter, chosen)

        def start(system: System) -> Peer:
            log = options.cache / "logs" / f"{system.name}, {name} {precision}.log"
            status.update(f"{name} {precision}: {system.name}: installing")
            return system.start(options.cache, log, options.threads)

        def ceilings_again(number: int) -> None:
            status.update(f"{name} {precision}: the machine's ceilings")
            floors.measure()

        compare(
            matter,
            options.systems,
            chosen,
            warm_up(tokens),
            rounds=options.rounds,
            start=start,
            before_round=ceilings_again,
            into=found,
            say=status.update,
        )
        found.records += floors.records(options.rounds)
    found.about["machine"] = floors.about()


class _Floors:
    """The machine's ceilings, the best of all rounds, and what workloads take at least by them."""

    def __init__(self, matter: Matter, workloads: list[Workload]) -> None:
        self._matter = matter
        self._workloads = workloads
        self._model = floor.count(matter.directory, matter.precision)
        self._ceilings: Ceilings | None = None

    def measure(self) -> None:
        """Once more, to be called while everything else is idle."""
        found = ceilings.measure(
            self._matter.threads, working_set=max(2**26, int(self._model.weight_bytes))
        )
        self._ceilings = self._ceilings.or_better(found) if self._ceilings else found

    def records(self, rounds: int) -> list[Record]:
        """As of a system that is as fast as the machine: the same value in every round."""
        assert self._ceilings is not None
        found = []
        for workload in self._workloads:
            values = floor.measures(
                workload,
                self._model,
                self._ceilings,
                max_tokens=self._matter.max_tokens,
                max_sequences=self._matter.max_sequences,
            )
            found += [
                Record(
                    FLOOR,
                    self._matter.shape,
                    workload.name,
                    self._matter.precision,
                    metric,
                    number,
                    value,
                )
                for number in range(rounds)
                for metric, value in values.items()
            ]
        return found

    def about(self) -> dict[str, str]:
        """The machine."""
        assert self._ceilings is not None
        return {
            "machine": platform.machine(),
            "threads": str(self._ceilings.threads),
            "read_bandwidth_gb_per_s": f"{self._ceilings.read_bandwidth / 1e9:.1f}",
            "fp32_tflops": f"{self._ceilings.fp32_flops / 1e12:.2f}",
            "bf16_tflops": f"{self._ceilings.bf16_flops / 1e12:.2f}",
            "int8_tops": f"{self._ceilings.int8_ops / 1e12:.2f}",
        }


def _write(options: _Options, found: Comparison) -> None:
    """Whatever there is, also of a run that was ended early."""
    save(found.records, options.out / "results.json")
    described = {
        "rounds": options.rounds,
        "seed": options.seed,
        "max_tokens": _MAX_TOKENS,
        "max_sequences": _MAX_SEQUENCES,
        "systems": found.about,
        "missing": found.failures,
    }
    (options.out / "run.json").write_text(json.dumps(described, indent=2) + "\n")


def _show(options: _Options, found: Comparison, console: Console) -> None:
    notes = [
        f"{name}: {', '.join(map(' '.join, about.items()))}" for name, about in found.about.items()
    ]
    notes += [f"missing: {name}: {why}" for name, why in found.failures.items()]
    tables = report.markdown(found.records, options.reference, notes)
    (options.out / "tables.md").write_text(tables)
    for case in cases(found.records):
        table = Table(title=report.title(case), title_justify="left")
        for number, heading in enumerate(report.header(case, options.reference)):
            table.add_column(heading, justify="right" if number else "left")
        for row in report.rows(found.records, case, options.reference):
            table.add_row(*row)
        console.print(table)
    for name, why in found.failures.items():
        console.print(f"[red]{name}: {why}")
    if found.records:
        report.draw(found.records, options.out / "peers.png")
    console.print(f"{len(found.records)} records in {options.out / 'results.json'}")
