"""B11: effective throughput. Requests per second that got their first token and every later one as
fast as was promised (DeepSpeed-FastGen's rule), SplitFuse beside prefill-first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments import plots
from experiments.benches import rotated
from experiments.closed_loop import PREFILL_FIRST, SPLITFUSE, WHOLE, Shape, Stage, stage
from experiments.collect import Point, Samples
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.records import ENGINES, EngineName, Record, Results
from scheduling.simulator.outcome import Outcome, Served

NAME = "B11"
SHAPES = (Shape(2600, 60), Shape(256, 256))
_BUDGETS = {PREFILL_FIRST: WHOLE, SPLITFUSE: 768}
"""FastGen's default budget is 768 tokens."""

_CLIENTS = (4, 8, 16)
_SPAN = 16  # of the moving average over gaps
PROMISES = (5.0, 7.5, 15.0)
"""Passes in which a token was promised. FastGen promises 6, 4 and 2 tokens a second; a generation
pass of its Llama-2-70B on four A100-80 takes about 33 ms, so that is 5, 7.5 and 15 of them."""

MIDDLE = 7.5
_PROMPT_SHARE = 1 / 8.8
"""Share of the engine's prompt speed at which the first token was promised. FastGen promises 512
tokens a second; its four A100 compute 8.8 times as many at half of their operations."""


@dataclass(frozen=True, slots=True)
class Promise:
    """`prompt_tokens_per_s`: by which the first token is due; `gap`: most seconds between tokens,
    as a moving average."""

    prompt_tokens_per_s: float
    gap: float

    @classmethod
    def of(cls, ground: Stage, passes: float) -> Promise:
        """FastGen's, in the measure of this engine."""
        return cls(_PROMPT_SHARE * ground.prompt_speed, passes * ground.step)

    def kept(self, served: Served) -> bool:
        """Whether this request got what was promised."""
        due = served.job.prompt_tokens / self.prompt_tokens_per_s
        if served.to_first_token > due:
            return False
        assert served.token_times is not None
        return slowest(np.diff(np.array(served.token_times)).tolist()) <= self.gap


def slowest(gaps: list[float]) -> float:
    """The highest value of the moving average over gaps, exponential with a span of 16 and
    adjusted at the start, as pandas' `ewm(span=16).mean()` is; 0 without gaps."""
    keep = 1 - 2 / (_SPAN + 1)
    total = weight = worst = 0.0
    for gap in gaps:
        total, weight = gap + keep * total, 1 + keep * weight
        worst = max(worst, total / weight)
    return worst


def _measure(run: Run) -> list[Record]:
    ground = stage(run)
    samples = Samples(NAME, run.engine)
    clients = run.sized(_CLIENTS, _CLIENTS[-1:])
    run.progress.expect(len(run.seeds) * len(SHAPES) * len(clients) * len(_BUDGETS))
    for number, seed in enumerate(run.seeds):
        for shape in SHAPES:
            best: dict[tuple[str, float], float] = {}
            for callers in clients:
                for way in rotated(tuple(_BUDGETS), number):
                    outcome = ground.serve(
                        shape, seed, batching=way, budget=_BUDGETS[way], clients=callers
                    )
                    for passes in PROMISES:
                        found = _effective(outcome, Promise.of(ground, passes))
                        best[way, passes] = max(found, best.get((way, passes), 0.0))
                    run.progress.done(f"{NAME} {shape.name}, {way}, {callers} clients")
            for (way, passes), value in best.items():
                samples.add(_point(way, shape, passes), effective_per_s=value)
    return samples.records()


def _point(way: str, shape: Shape, passes: float) -> Point:
    return Point(f"{way}, {shape.name}", axis="passes per token promised", at=passes)


def _effective(outcome: Outcome, promise: Promise) -> float:
    kept = sum(promise.kept(served) for served in outcome.served)
    return kept / outcome.makespan


def _tables(results: Results) -> list[Table]:
    tables = []
    for engine, title in plots.ENGINE_TITLES.items():
        here = results.where(experiment=NAME, engine=engine, metric="effective_per_s")
        rows = []
        for policy in here.distinct("policy"):
            found = list(here.where(policy=str(policy)))
            rows.append((str(policy), *(f"{r.value:.2f}" for r in found)))
        if rows:
            header = ("", *(f"within {passes:g} passes" for passes in PROMISES))
            tables.append(Table(f"Requests/s that kept the promise, {title}", header, tuple(rows)))
    return tables


def ratio(results: Results, engine: EngineName, shape: Shape) -> float | None:
    """Effective throughput of SplitFuse over prefill-first at the middle promise."""
    here = results.where(experiment=NAME, engine=engine, at=MIDDLE, metric="effective_per_s")
    ours = here.value(policy=f"{SPLITFUSE}, {shape.name}")
    theirs = here.value(policy=f"{PREFILL_FIRST}, {shape.name}")
    return ours / theirs if ours is not None and theirs else None


def _bars(results: Results) -> list[Bar]:
    bars = []
    for engine in ENGINES:
        for shape, limit in zip(SHAPES, (1.3, 0.95), strict=True):
            found = ratio(results, engine, shape)
            if found is not None:
                claim = f"B11 effective throughput {shape.name}, SplitFuse over prefill-first"
                bars.append(Bar(claim, engine, found, limit, True))
    return bars


def _draw(results: Results, folder: Path) -> list[Path]:
    path = folder / "b11-promises.png"
    return plots.panels_by_engine(results.where(experiment=NAME), path, len(SHAPES), _draw_row)


def _draw_row(here: Results, title: str, row: plots.Panels) -> None:
    for panel, shape in zip(row, SHAPES, strict=True):
        for way in _BUDGETS:
            found = list(here.where(policy=f"{way}, {shape.name}"))
            plots.line(panel, [r.at or 0 for r in found], found, way)
        panel.set(
            title=shape.name,
            xlabel="passes per token that were promised",
            ylabel=f"requests/s that kept it\n({title})",
        )
        panel.set_ylim(0, None)


EXPERIMENTS = (
    Experiment(
        name=NAME,
        title="Effective throughput: requests that kept the promise",
        engines=("simulator", "real"),
        measure=_measure,
        draw=_draw,
        bars=_bars,
        tables=_tables,
    ),
)
