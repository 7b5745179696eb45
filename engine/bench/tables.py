"""The tables of the engine's benchmark, made of its records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.table import Table as RichTable

from engine.bench.passes import CONTEXTS
from engine.bench.records import Point, Record, Setup, points

_CONTEXT = 128  # of the table over batches
_BATCHES = (1, 32)  # of the table over contexts
_COSTS = {
    "base": ("base, ms", 1e3),
    "per_token": ("per prompt token, us", 1e6),
    "per_attention": ("per token and attended position, ns", 1e9),
    "per_sequence": ("per generating sequence, us", 1e6),
    "per_context": ("per position of context, ns", 1e9),
    "median_error": ("median error, %", 1e2),
    "swap_seconds_per_block": ("block to the host or back, us", 1e6),
}


@dataclass(frozen=True, slots=True)
class Table:
    """Text cells; the first `names` columns are names, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    names: int = 3

    def markdown(self) -> str:
        """As GitHub shows it."""
        lines = [("---",) * self.names + ("---:",) * (len(self.header) - self.names)]
        body = "\n".join(f"| {' | '.join(row)} |" for row in (self.header, *lines, *self.rows))
        return f"**{self.title}**\n\n{body}\n"

    def rich(self) -> RichTable:
        """As a terminal shows it."""
        table = RichTable(title=self.title)
        for place, heading in enumerate(self.header):
            table.add_column(heading, justify="left" if place < self.names else "right")
        for row in self.rows:
            table.add_row(*row)
        return table


def tables(records: list[Record]) -> dict[str, Table]:
    """All tables that the records are enough for, by name."""
    found = points(records)
    made = {
        "ceilings": _ceilings(records),
        "prompts": _passes(
            "Prompt chunks at the start of a prompt",
            [p for p in found if p.workload == "prompt" and p.batch == 1 and p.tokens == p.context],
            "tokens",
            lambda point: point.tokens,
        ),
        "batches": _passes(
            f"Generation at a context of {_CONTEXT} tokens",
            [p for p in found if p.workload == "generation" and p.context == _CONTEXT],
            "batch",
            lambda point: point.batch,
        ),
        "contexts": _passes(
            "Generation over the context",
            sorted(
                (p for p in found if p.workload == "generation" and _in_contexts(p)),
                key=lambda point: (str(point.setup), point.batch, point.context),
            ),
            "batch x context",
            lambda point: f"{point.batch} x {point.context}",
        ),
        "cost": _costs(records),
        "beside": _beside(records),
    }
    return {name: table for name, table in made.items() if table.rows}


def _in_contexts(point: Point) -> bool:
    return point.batch in _BATCHES and point.context in CONTEXTS


def _names(setup: Setup) -> tuple[str, str, str]:
    return setup.model, setup.precision, setup.backend


def _passes(title: str, chosen: list[Point], axis: str, at: Callable[[Point], object]) -> Table:
    plain = {_place(point): point for point in chosen if point.setup.backend == "torch"}
    compared = any(p.setup.backend != "torch" and _place(p) in plain for p in chosen)
    header: tuple[str, ...] = ("model", "precision", "backend", axis, "ms", "fastest", "tokens/s")
    header += ("floor, ms", "MBU", "MFU", "of the floor")
    last = ("torch / this",) if compared else ()
    rows = []
    for point in chosen:
        cells = [
            *_names(point.setup),
            str(at(point)),
            f"{point.seconds * 1e3:.1f}",
            f"{point.fastest_seconds * 1e3:.1f}",
            f"{point.tokens / point.seconds:.0f}",
            "-" if point.floor is None else f"{point.floor * 1e3:.1f}",
            *("-" if share is None else f"{share:.2f}" for share in _shares(point)),
        ]
        if compared:
            other = plain.get(_place(point))
            cells.append("-" if other is None else f"{other.seconds / point.seconds:.2f}")
        rows.append(tuple(cells))
    return Table(title, (*header, *last), rows)


def _shares(point: Point) -> tuple[float | None, ...]:
    return point.mbu, point.mfu, point.share


def _place(point: Point) -> tuple[object, ...]:
    """What two backends are compared at."""
    setup = point.setup
    return (setup.model, setup.precision, setup.threads, point.tokens, point.batch, point.context)


def _ceilings(records: Iterable[Record]) -> Table:
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for record in records:
        if record.workload == "ceilings":
            rows.setdefault((record.model, str(record.threads)), {})[record.metric] = record.value
    header = ("working set", "threads", "read, GB/s", "fp32, GFLOP/s", "bf16, GFLOP/s")
    return Table(
        "What this machine can do",
        (*header, "int8, Gop/s"),
        [
            (
                f"{values['working_set'] / 2**20:.0f} MiB ({model})",
                threads,
                f"{values['read_bandwidth'] / 1e9:.1f}",
                *(f"{values[m] / 1e9:.0f}" for m in ("fp32_flops", "bf16_flops", "int8_ops")),
            )
            for (model, threads), values in rows.items()
        ],
        names=1,
    )


def _costs(records: Iterable[Record]) -> Table:
    columns: dict[Setup, dict[str, float]] = {}
    for record in records:
        if record.workload == "cost":
            columns.setdefault(record.setup, {})[record.metric] = record.value
    rows = [
        (heading, *(f"{values[metric] * scale:.2f}" for values in columns.values()))
        for metric, (heading, scale) in _COSTS.items()
        if columns and all(metric in values for values in columns.values())
    ]
    header = ("", *(" ".join(_names(setup)) for setup in columns))
    return Table("The fitted cost of a pass, and of swapping a KV block", header, rows, names=1)


def _beside(records: Iterable[Record]) -> Table:
    rows: dict[tuple[Setup, int, int], dict[str, float]] = {}
    for record in records:
        if record.workload == "beside":
            place = (record.setup, record.batch, record.context)
            rows.setdefault(place, {})[record.metric] = record.value
    header = ("model", "precision", "backend", "batch", "step, ms", "tokens/s")
    return Table(
        "Generation steps beside transformers, in turn",
        (*header, "transformers, ms", "transformers / Baton"),
        [
            (
                *_names(setup),
                str(batch),
                f"{values['seconds'] * 1e3:.1f}",
                f"{batch / values['seconds']:.0f}",
                f"{values['transformers_seconds'] * 1e3:.1f}",
                f"{values['transformers_seconds'] / values['seconds']:.2f}",
            )
            for (setup, batch, _), values in rows.items()
        ],
    )
