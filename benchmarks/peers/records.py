"""What a comparison gives: flat records, and ratios between systems."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

FLOOR = "floor"
HIGHER_IS_BETTER = {"output_tokens_per_s"}
METRICS = {"w1": ("output_tokens_per_s",), "w2": ("ttft_s", "tpot_s")}


@dataclass(frozen=True, slots=True)
class Record:
    """One value of one system in one round. Units are in the metric's name."""

    system: str
    shape: str
    workload: str
    precision: str
    metric: str
    round: int
    value: float


@dataclass(frozen=True, slots=True)
class Case:
    """What systems are compared in."""

    shape: str
    workload: str
    precision: str
    metric: str

    def medians(self, records: Iterable[Record]) -> dict[str, float]:
        """Of each system over its rounds, in order of appearance."""
        found: dict[str, list[float]] = {}
        for record in records:
            if case_of(record) == self:
                found.setdefault(record.system, []).append(record.value)
        return {system: statistics.median(values) for system, values in found.items()}

    def ratio(self, records: Iterable[Record], system: str, other: str) -> float | None:
        """How many times better `system` is than `other`: the median over the rounds that both
        ran, each ratio within one round. None if there is no such round."""
        values = {
            (record.system, record.round): record.value
            for record in records
            if case_of(record) == self
        }
        ratios = [
            value / values[other, number]
            for (name, number), value in values.items()
            if name == system and (other, number) in values
        ]
        if not ratios:
            return None
        middle = statistics.median(ratios)
        return middle if self.metric in HIGHER_IS_BETTER else 1 / middle


def case_of(record: Record) -> Case:
    """The case a record belongs to."""
    return Case(record.shape, record.workload, record.precision, record.metric)


def cases(records: Iterable[Record]) -> list[Case]:
    """Those that systems can be ranked in, in order of appearance."""
    found = dict.fromkeys(map(case_of, records))
    return [case for case in found if case.metric in METRICS.get(case.workload, ())]


def save(records: Iterable[Record], path: Path) -> None:
    """Write a JSON list, one record a line."""
    lines = ",\n".join(json.dumps(asdict(record)) for record in records)
    path.write_text(f"[\n{lines}\n]\n" if lines else "[]\n")


def load(path: Path) -> list[Record]:
    """Read what `save` wrote."""
    return [Record(**each) for each in json.loads(path.read_text())]
