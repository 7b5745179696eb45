"""B12: the time of a pass is set by its tokens, not by its sequences; throughput is concave in
tokens (the two findings that Dynamic SplitFuse rests on). On a real engine."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from pathlib import Path
from statistics import median

from experiments import plots
from experiments.collect import Point, Samples
from experiments.experiment import Bar, Experiment, Run, Table
from experiments.real import RealEngine, tiny_llama
from experiments.records import Record, Results
from scheduling.plan import Capacity, Chunk, StepPlan
from scheduling.sequence import Sequence
from scheduling.simulator.traffic import Job

NAME = "B12"
_MOST = 1024  # tokens of a pass
_CAPACITY = Capacity(
    blocks=512, block_size=16, max_tokens=_MOST, max_sequences=64, max_context=2048
)
_SPLITS = (1, 2, 4, 8, 16)
_FIXED = (128, 512)  # tokens of a pass that is split over sequences
_SIZES = (1, 4, 16, 32, 64, 128, 256, 512, 1024)


def pass_of(tokens: int, sequences: int) -> StepPlan:
    """The first pass of `sequences` prompts of equal length, `tokens` in all."""
    length = tokens // sequences
    blocks = _CAPACITY.blocks_for(length)
    chunks = []
    for number in range(sequences):
        job = Job(f"p{number}", 0.0, length, 1, 1)
        sequence = Sequence.start(job.request(), 0, now=0.0)
        sequence.blocks = list(range(number * blocks, (number + 1) * blocks))
        chunks.append(Chunk(sequence, 0, length, sample=True))
    return StepPlan(tuple(chunks))


def _measure(run: Run) -> list[Record]:
    samples = Samples(NAME, "real")
    rounds = run.sized(5, 3)
    # Large enough for its arithmetic to weigh more than what surrounds it.
    layers, hidden = run.sized((6, 512), (2, 128))
    run.progress.expect(len(run.seeds))
    engine = tiny_llama(layers=layers, hidden=hidden, capacity=_CAPACITY)
    shapes = [(t, n) for t in _FIXED for n in _SPLITS] + [(t, 1) for t in _SIZES]
    _seconds(engine, shapes, rounds=1)  # the first of each shape is slower
    for seed in run.seeds:
        found = _seconds(engine, shapes, rounds)
        for tokens in _FIXED:
            alone = found[tokens, 1]
            for count in _SPLITS:
                point = Point(f"{tokens} tokens", axis="sequences", at=count)
                taken = found[tokens, count]
                samples.add(point, pass_s=taken, beside_one_sequence=taken / alone)
        for tokens in _SIZES:
            taken = found[tokens, 1]
            point = Point("one sequence", axis="tokens", at=tokens)
            samples.add(point, pass_s=taken, tokens_per_s=tokens / taken)
        run.progress.done(f"{NAME} round {seed}")
    return samples.records()


def _seconds(
    engine: RealEngine, shapes: Items[tuple[int, int]], rounds: int
) -> dict[tuple[int, int], float]:
    """Median seconds of a pass of each shape (tokens, sequences). All shapes take turns, so that
    a slow moment of the machine hits all of them alike."""
    taken: dict[tuple[int, int], list[float]] = {shape: [] for shape in shapes}
    for _ in range(rounds):
        for shape in taken:
            plan = pass_of(*shape)
            started = time.thread_time()  # other threads of the machine count for nobody
            engine.executor.execute(plan)
            taken[shape].append(time.thread_time() - started)
    return {shape: median(values) for shape, values in taken.items()}


def _tables(results: Results) -> list[Table]:
    mine = results.where(experiment=NAME)
    rows = []
    for tokens in _FIXED:
        found = mine.where(policy=f"{tokens} tokens", metric="pass_s")
        if len(found) == len(_SPLITS):
            rows.append((f"{tokens} tokens", *(f"{1e3 * r.value:.1f}" for r in found)))
    sizes = list(mine.where(policy="one sequence", metric="tokens_per_s"))
    tables = []
    if rows:
        header = ("pass of", *(f"{n} sequences" if n > 1 else "1 sequence" for n in _SPLITS))
        tables.append(
            Table("Milliseconds of a pass, by how many sequences share it", header, tuple(rows))
        )
    if sizes:
        head = ("", *(f"{r.at:g}" for r in sizes))
        row = ("tokens/s", *(f"{r.value:,.0f}" for r in sizes))
        tables.append(Table("Throughput by the tokens of a pass", head, (row,)))
    return tables


def _bars(results: Results) -> list[Bar]:
    found = list(results.where(experiment=NAME, metric="beside_one_sequence"))
    if not found:
        return []
    worst = max(record.value for record in found)
    return [
        Bar("B12 a pass in 1..16 sequences, slowest over one sequence", "real", worst, 1.1, False)
    ]


def _draw(results: Results, folder: Path) -> list[Path]:
    path = folder / "b12-tokens.png"
    return plots.panels(results.where(experiment=NAME), path, 2, _draw_panels, width=4.6)


def _draw_panels(mine: Results, panels: plots.Panels) -> None:
    left, right = panels
    for tokens in _FIXED:
        found = list(mine.where(policy=f"{tokens} tokens", metric="beside_one_sequence"))
        plots.line(left, [r.at or 0 for r in found], found, f"{tokens} tokens")
    left.set(
        xscale="log", xlabel="sequences that share the pass", ylabel="time / time with one sequence"
    )
    left.set_xticks(_SPLITS, [str(n) for n in _SPLITS])
    left.minorticks_off()
    left.set_ylim(0, None)
    left.axhspan(0.9, 1.1, color="#EEEEEE", zorder=0)
    left.legend(frameon=False)
    sizes = list(mine.where(policy="one sequence", metric="tokens_per_s"))
    plots.line(right, [r.at or 0 for r in sizes], sizes, "one sequence")
    right.set(xlabel="tokens of the pass", ylabel="tokens per second", xscale="log")
    right.set_ylim(0, None)


EXPERIMENTS = (
    Experiment(
        name=NAME,
        title="Tokens, not sequences, set the time of a pass",
        engines=("real",),
        measure=_measure,
        draw=_draw,
        bars=_bars,
        tables=_tables,
    ),
)
