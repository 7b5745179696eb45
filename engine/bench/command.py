"""`baton bench engine`: what passes take, how near the machine's limits that is, and what the
simulator is to think of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

import demo_model
from baton import cores
from baton.errors import ModelError
from baton.plots import pyplot
from engine import ceilings
from engine.bench import beside, plots
from engine.bench.backends import QUANTIZED, backend_of, load, weights_of
from engine.bench.models import SHAPES, random_llama
from engine.bench.passes import Progress, shapes, time_passes
from engine.bench.records import Point, Record, Setup, plain, save
from engine.bench.tables import tables
from engine.bench.work import ModelCount
from engine.fit import Fit, fit_to
from engine.model.runner import TorchExecutor

_HOST_KV_MEMORY = 64 * 2**20
_MAX_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    model: Path | None
    shape: tuple[str, ...]  # names in models.SHAPES, or demo
    dtype: tuple[str, ...]
    threads: int  # 0: as many as there are cores
    repeats: int
    kv_memory: int  # bytes; passes that need more are left out
    compare: tuple[str, ...]  # transformers, torch
    steps: int  # beside transformers
    plots: bool
    out: Path | None
    profile: Path | None


def run(options: Options) -> None:
    """Measure, print, and write what `options` asks for. Raises ModelError and ConfigError."""
    if options.plots and options.out is not None:
        pyplot()  # raises now, not when all is measured
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console(stderr=True)
    records: list[Record] = []
    fits: list[Fit] = []
    with tempfile.TemporaryDirectory() as directory, console.status("") as status:
        for path, name in _models(options, Path(directory), status.update):
            for dtype in options.dtype:
                told = _Told(f"{name} {dtype}", status.update)
                found, fit = _measure(path, name, dtype, options, told)
                records += found
                fits.append(fit)
                if "transformers" in options.compare:
                    records += _beside(path, name, dtype, options, told)
    printed = tables(records)
    for table in printed.values():
        Console(width=120).print(table.rich())
    if options.profile is not None:
        fits[0].profile.save(options.profile)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        save(options.out / "results.json", records)
        text = "\n".join(table.markdown() for table in printed.values())
        (options.out / "tables.md").write_text(text)
        if options.plots:
            plots.draw(records, options.out)


class _Told:
    """Progress with the name of what is measured before it."""

    def __init__(self, prefix: str, progress: Progress) -> None:
        self._prefix, self._progress = prefix, progress

    def __call__(self, line: str) -> None:
        self._progress(f"{self._prefix}: {line}")


def _models(options: Options, directory: Path, progress: Progress) -> Iterator[tuple[Path, str]]:
    """The directories and names of what is measured."""
    if options.model is not None:
        yield options.model, options.model.name
        return
    for shape in options.shape:
        if shape in SHAPES:
            progress(f"making a random Llama of the {shape} shape")
            random_llama(directory / shape, shape)
            yield directory / shape, f"random {shape}"
        else:
            yield demo_model.path(), "demo"


def _measure(
    path: Path, name: str, dtype: str, options: Options, progress: Progress
) -> tuple[list[Record], Fit]:
    """One model in one format, on each backend that is asked for; the fit is of the first."""
    with ExitStack() as stack:
        executors: list[TorchExecutor] = []
        for backend in _backends(dtype, options):
            progress(f"loading, backend {backend}")
            executor = stack.enter_context(_loaded(path, dtype, backend, options))
            if backend_of(executor) not in map(backend_of, executors):
                executors.append(executor)
        first = executors[0]
        weights, threads = weights_of(first, dtype), _threads(options)
        count = _count(path, weights, first)
        before = _ceilings(threads, count, progress)
        wanted = shapes(first.capacity)
        timed = time_passes(executors, wanted, repeats=options.repeats, progress=progress)
        progress("swaps")
        fit = fit_to(timed[0], first, f"{name} {dtype}", repeats=options.repeats)
        best = before.or_better(_ceilings(threads, count, progress))
        setups = [
            Setup("baton", backend_of(executor), name, weights, threads) for executor in executors
        ]
    records = plain(Setup("machine", "", name, "", threads), "ceilings", _values(best))
    records += plain(setups[0], "cost", _costs(fit))
    for setup, passes in zip(setups, timed, strict=True):
        for one in passes:
            records += Point.of(setup, one, count, best).records()
    return records, fit


@contextmanager
def _loaded(path: Path, dtype: str, backend: str, options: Options) -> Iterator[TorchExecutor]:
    executor = load(
        path,
        backend,
        dtype=dtype,
        threads=_threads(options),
        kv_memory=options.kv_memory,
        host_kv_memory=_HOST_KV_MEMORY,
        max_batch_tokens=_MAX_TOKENS,
    )
    try:
        executor.warm_up()
        yield executor
    finally:
        executor.close()


def _backends(dtype: str, options: Options) -> tuple[str, ...]:
    both = "torch" in options.compare and dtype not in QUANTIZED
    return ("auto", "torch") if both else ("auto",)


def _threads(options: Options) -> int:
    return options.threads or cores.available()


def _count(path: Path, weights: str, executor: TorchExecutor) -> ModelCount | None:
    """None where the family is not known: its passes are timed all the same."""
    try:
        return ModelCount.at(path, weights, executor.pool.geometry.dtype)
    except ModelError:
        return None


def _ceilings(threads: int, count: ModelCount | None, progress: Progress) -> ceilings.Ceilings:
    progress("what the machine can do")
    if count is None:
        return ceilings.measure(threads)
    return ceilings.measure(threads, working_set=int(count.weight_bytes))


def _values(found: ceilings.Ceilings) -> dict[str, float]:
    return {name: value for name, value in asdict(found).items() if name != "threads"}


def _costs(fit: Fit) -> dict[str, float]:
    costs = {"swap_seconds_per_block": fit.profile.swap_seconds_per_block}
    return asdict(fit.profile.cost) | {"median_error": fit.median_error} | costs


def _beside(
    path: Path, name: str, dtype: str, options: Options, progress: Progress
) -> list[Record]:
    rows = beside.measure(
        path, name, dtype, steps=options.steps, threads=_threads(options), progress=progress
    )
    records = []
    for row in rows:
        setup = Setup("baton", row.backend, name, row.dtype, _threads(options))
        values = {"seconds": row.step, "transformers_seconds": row.reference_step}
        records += plain(
            setup, "beside", values, tokens=row.batch, batch=row.batch, context=row.context
        )
    return records
