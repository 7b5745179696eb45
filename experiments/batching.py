"""B15: when requests may join a batch. Static: when it is empty; dynamic: when it is empty and full
enough, or somebody has waited; continuous: at any pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments import plots
from experiments.benches import rotated
from experiments.collect import Point, Samples
from experiments.engines import Engine, Setup, SimulatedEngine
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.records import ENGINES, Record, Results
from scheduling.order import make_policy
from scheduling.plan import Capacity
from scheduling.rules import Rules
from scheduling.simulator.outcome import Outcome
from scheduling.simulator.profiles import profile
from scheduling.simulator.traffic import Job, Lengths, LogNormal, make_jobs, offline, poisson

NAME = "B15"
BATCH = 16
"""Where the ways are compared, and of the runs with arrivals."""

LOADS = (0.2, 0.4, 0.6, 0.8)
"""Arrival rate over the saturation rate of continuous batching."""

_WAYS = ("static", "dynamic", "continuous")
_WAIT_STEPS = 5  # passes that a dynamic batch waits for more


@dataclass(frozen=True, slots=True)
class _Place:
    """An engine with lengths to suit it: prompts of one length, outputs whose standard deviation
    is their mean."""

    engine: Engine
    lengths: Lengths
    batches: tuple[int, ...]
    requests: int  # of a run with arrivals

    def ways(self) -> dict[str, Rules]:
        """The rules by name."""
        wait = _WAIT_STEPS * self.engine.step_seconds
        return {
            "static": Rules(filling="static"),
            "dynamic": Rules(filling="dynamic", dynamic_wait=wait),
            "continuous": Rules(),
        }

    def serve(self, way: str, batch: int, jobs: Sequence[Job]) -> Outcome:
        """One run, first come first served."""
        setup = Setup(
            lambda cost: make_policy("fcfs", cost=cost),
            self.ways()[way],
            replace(self.engine.capacity, max_sequences=batch),
        )
        return self.engine.serve(jobs, setup)


def _place(run: Run) -> _Place:
    if run.engine == "simulator":
        made = profile("a100-40-llama-2-7b")
        capacity = made.capacity(max_tokens=2048, max_sequences=BATCH)
        lengths = Lengths("512/64", LogNormal(512, 0.0), LogNormal(64, 1.0), 512, 2048)
        engine = SimulatedEngine(made.cost, capacity, context=544)
        return _Place(engine, lengths, run.sized((1, 4, 16, 64), (1, 16)), run.sized(600, 150))
    from experiments.real import tiny_llama  # imports torch

    room = Capacity(
        blocks=1024, block_size=16, max_tokens=256, max_sequences=BATCH, max_context=512
    )
    lengths = Lengths("64/32", LogNormal(64, 0.0), LogNormal(32, 1.0), 64, 512)
    real = tiny_llama(capacity=room)
    return _Place(real, lengths, run.sized((1, 4, 16), (4, 16)), run.sized(300, 40))


def _measure(run: Run) -> list[Record]:
    place = run.once((NAME, run.engine), lambda: _place(run))
    samples = Samples(NAME, run.engine)
    ways = tuple(place.ways())
    backlogged = ("static", "continuous")  # with a backlog nobody waits for a batch to fill
    loads = run.sized(LOADS, LOADS[1::2])
    run.progress.expect(
        len(run.seeds) * (len(place.batches) * len(backlogged) + len(loads) * len(ways))
    )
    for number, seed in enumerate(run.seeds):
        for batch in place.batches:
            jobs = make_jobs(
                place.lengths, offline, min(max(run.sized(96, 32), 8 * batch), 512), seed=seed
            )
            for way in rotated(backlogged, number):
                outcome = place.serve(way, batch, jobs)
                point = Point(way, axis="batch", at=batch)
                samples.add(
                    point,
                    tokens_per_s=outcome.throughput(),
                    requests_per_s=outcome.completion_rate(),
                )
                run.progress.done(f"{NAME} {way}, batches of {batch}")
        full = samples.values(Point("continuous", axis="batch", at=BATCH), "requests_per_s")[-1]
        for load in loads:
            jobs = make_jobs(place.lengths, poisson(load * full), place.requests, seed=seed)
            for way in rotated(ways, number):
                samples.add(Point(way, load), **_latency(place.serve(way, BATCH, jobs)))
                run.progress.done(f"{NAME} {way}, load {load:g}")
    for batch in place.batches:
        over, under = (Point(way, axis="batch", at=batch) for way in ("continuous", "static"))
        samples.compare(over, under, "tokens_per_s")
        samples.compare(over, under, "requests_per_s")
    return samples.records()


def _latency(outcome: Outcome) -> dict[str, float]:
    kept = outcome.after_warmup()
    return {
        "mean_jct_s": kept.mean_completion(),
        "p99_jct_s": kept.completion_percentile(99),
        "mean_ttft_s": float(kept.first_token().mean()),
    }


def _tables(results: Results) -> list[Table]:
    tables = []
    for engine, title in plots.ENGINE_TITLES.items():
        here = results.where(experiment=NAME, engine=engine)
        ratios = list(here.where(metric="requests_per_s_ratio"))
        if ratios:
            batches = [r.at for r in ratios]
            rows = [
                (
                    way,
                    *(
                        f"{here.value(policy=way, at=b, metric='requests_per_s'):.3g}"
                        for b in batches
                    ),
                )
                for way in ("static", "continuous")
            ]
            rows.append(("continuous over static", *(f"{r.value:.2f}" for r in ratios)))
            header = ("requests/s, backlog", *(f"batch {b:g}" for b in batches))
            tables.append(Table(f"Throughput, {title}", header, tuple(rows)))
        rows = []
        for way in _WAYS:
            found = list(here.where(policy=way, metric="mean_jct_s"))
            tails = list(here.where(policy=way, metric="p99_jct_s"))
            if found:
                cells = (
                    f"{a.value:.3g} / {b.value:.3g}" for a, b in zip(found, tails, strict=True)
                )
                rows.append((way, *cells))
        if rows:
            head = ("mean / P99 JCT, s", *(f"load {r.load:g}" for r in found))
            tables.append(Table(f"Latency in batches of {BATCH}, {title}", head, tuple(rows)))
    return tables


def _bars(results: Results) -> list[Bar]:
    bars = []
    for engine in ENGINES:
        here = results.where(experiment=NAME, engine=engine, at=BATCH)
        found = here.value(metric="requests_per_s_ratio")
        if found is not None:
            claim = f"B15 throughput in batches of {BATCH}, continuous over static"
            bars.append(Bar(claim, engine, found, 2.0, True))
    return bars


def _draw(results: Results, folder: Path) -> list[Path]:
    path = folder / "b15-batching.png"
    return plots.panels_by_engine(results.where(experiment=NAME), path, 2, _draw_row)


def _draw_row(here: Results, title: str, row: plots.Panels) -> None:
    backlog, arrivals = row
    for way in _WAYS:
        rates = list(here.where(policy=way, metric="tokens_per_s"))
        if rates:
            plots.line(backlog, [r.at or 0 for r in rates], rates, way)
        found = list(here.where(policy=way, metric="mean_jct_s"))
        plots.line(arrivals, [r.load or 0 for r in found], found, way)
    sizes = sorted({r.at for r in here.where(metric="tokens_per_s") if r.at})
    backlog.set_xscale("log")
    backlog.set_xticks(sizes, [f"{size:g}" for size in sizes])
    backlog.minorticks_off()
    backlog.set(xlabel="sequences in a batch", ylabel=f"tokens per second, backlog\n({title})")
    backlog.set_ylim(0, None)
    arrivals.set(xlabel="load", ylabel="mean JCT, s", yscale="log")


EXPERIMENTS = (
    Experiment(
        name=NAME,
        title="Static, dynamic and continuous batching",
        engines=("simulator", "real"),
        measure=_measure,
        draw=_draw,
        bars=_bars,
        tables=_tables,
    ),
)
