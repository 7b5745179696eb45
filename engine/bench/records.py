"""What the engine's benchmark reports: flat records, and points made of them again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from engine.bench.passes import TimedPass
from engine.bench.work import ModelCount
from engine.ceilings import Ceilings

_METRICS = ("seconds", "fastest_seconds", "bytes", "operations", "mbu", "mfu")


@dataclass(frozen=True, slots=True)
class Setup:
    """What was measured."""

    system: str  # baton, transformers, or machine for its ceilings
    backend: str  # compiled, torch
    model: str
    precision: str  # of the weights
    threads: int


@dataclass(frozen=True, slots=True)
class Record:
    """One metric of one setup at one point. `tokens`, `batch` and `context` are those of the pass;
    0 where there is no pass. Units are in the metric's name."""

    system: str
    backend: str
    model: str
    precision: str
    threads: int
    workload: str  # prompt, generation, mixed; beside, cost or ceilings
    tokens: int
    batch: int
    context: int
    metric: str
    value: float

    @property
    def setup(self) -> Setup:
        """What it is of."""
        return Setup(self.system, self.backend, self.model, self.precision, self.threads)


@dataclass(frozen=True, slots=True)
class Point:
    """One pass: its median time and its shortest, what it had to do, and the shares of what the
    machine could do meanwhile that its median amounts to.

    `floor` is the least seconds that it can take: the longer of moving its bytes and of computing
    (engine/bench/work.py). None of that where the model's work is not counted.
    """

    setup: Setup
    workload: str
    tokens: int
    batch: int
    context: int
    seconds: float
    fastest_seconds: float
    bytes: float | None = None
    operations: float | None = None
    mbu: float | None = None  # share of the measured read bandwidth
    mfu: float | None = None  # share of the measured peak of matrix products

    @classmethod
    def of(
        cls, setup: Setup, timed: TimedPass, count: ModelCount | None, ceilings: Ceilings
    ) -> Point:
        """The point of a timed pass."""
        shape, seconds = timed.shape, timed.seconds
        place = (shape.kind, shape.tokens, shape.batch, shape.context)
        point = cls(setup, *place, seconds, timed.fastest)
        if count is None:
            return point
        work = count.work(shape.parts)
        return replace(
            point,
            bytes=work.bytes,
            operations=work.operations,
            mbu=work.bytes / seconds / ceilings.read_bandwidth,
            mfu=work.operations / seconds / ceilings.operations(count.precision),
        )

    @property
    def share(self) -> float | None:
        """Floor over measured: 1 is as fast as the machine can be."""
        return None if self.mbu is None or self.mfu is None else max(self.mbu, self.mfu)

    @property
    def floor(self) -> float | None:
        """Seconds."""
        return None if self.share is None else self.share * self.seconds

    def records(self) -> list[Record]:
        """One per metric."""
        values = {name: getattr(self, name) for name in _METRICS}
        return plain(
            self.setup,
            self.workload,
            {name: value for name, value in values.items() if value is not None},
            tokens=self.tokens,
            batch=self.batch,
            context=self.context,
        )


def plain(
    setup: Setup,
    workload: str,
    values: dict[str, float],
    *,
    tokens: int = 0,
    batch: int = 0,
    context: int = 0,
) -> list[Record]:
    """A record per metric, of no pass if nothing is said of one."""
    return [
        Record(
            **asdict(setup),
            workload=workload,
            tokens=tokens,
            batch=batch,
            context=context,
            metric=metric,
            value=value,
        )
        for metric, value in values.items()
    ]


def points(records: Iterable[Record]) -> list[Point]:
    """The passes in the records, in their order."""
    found: dict[tuple[Setup, str, int, int, int], dict[str, float]] = {}
    for record in records:
        if record.workload in ("prompt", "generation", "mixed"):
            key = (record.setup, record.workload, record.tokens, record.batch, record.context)
            found.setdefault(key, {})[record.metric] = record.value
    return [
        Point(
            *key,
            values["seconds"],
            values["fastest_seconds"],
            *(values.get(name) for name in _METRICS[2:]),
        )
        for key, values in found.items()
    ]


def save(path: Path, records: Iterable[Record]) -> None:
    """Write a JSON list, one record a line."""
    lines = ",\n".join(json.dumps(asdict(record)) for record in records)
    path.write_text(f"[\n{lines}\n]\n" if lines else "[]\n")


def load(path: Path) -> list[Record]:
    """Read what `save` wrote."""
    return [Record(**each) for each in json.loads(path.read_text())]
