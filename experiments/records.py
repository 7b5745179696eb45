"""What an experiment reports: flat records, and how to find them again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from experiments.stats import Interval

EngineName = Literal["real", "simulator"]
ENGINES: tuple[EngineName, ...] = ("simulator", "real")


@dataclass(frozen=True, slots=True)
class Record:
    """One metric of one policy at one point of one experiment.

    `load` is the arrival rate over the measured steady saturation rate; None where there is no
    rate. `axis` and `at` name another swept quantity and its value. `ci_low` and `ci_high` bound
    the 95% confidence interval of `value` over the seeds; equal to it with one seed. Seconds and
    tokens are not scaled: units are in the metric's name (`mean_jct_s`, `peak_kv_tokens`).
    """

    experiment: str
    engine: EngineName
    policy: str
    load: float | None
    metric: str
    value: float
    ci_low: float
    ci_high: float
    seeds: int
    axis: str = ""
    at: float | None = None

    @classmethod
    def of(
        cls,
        experiment: str,
        engine: EngineName,
        policy: str,
        metric: str,
        interval: Interval,
        *,
        load: float | None = None,
        axis: str = "",
        at: float | None = None,
    ) -> Record:
        """The record of an estimate over seeds."""
        return cls(
            experiment=experiment,
            engine=engine,
            policy=policy,
            load=load,
            metric=metric,
            value=interval.mean,
            ci_low=interval.low,
            ci_high=interval.high,
            seeds=interval.count,
            axis=axis,
            at=at,
        )


class Results:
    """Records, in the order they were made."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._records = list(records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Iterable[Record]) -> None:
        """Append."""
        self._records += records

    def where(
        self,
        *,
        experiment: str | None = None,
        engine: str | None = None,
        policy: str | None = None,
        load: float | None = None,
        metric: str | None = None,
        at: float | None = None,
    ) -> Results:
        """The records that have every given value."""
        wanted = {
            "experiment": experiment,
            "engine": engine,
            "policy": policy,
            "load": load,
            "metric": metric,
            "at": at,
        }
        given = {name: value for name, value in wanted.items() if value is not None}
        return Results(
            record
            for record in self._records
            if all(getattr(record, name) == value for name, value in given.items())
        )

    def value(self, **wanted: object) -> float | None:
        """The value of the only record that `where(**wanted)` finds; None if there is none.
        Raises ValueError if there are several."""
        found = list(self.where(**wanted))  # type: ignore[arg-type] # the same keywords
        if len(found) > 1:
            raise ValueError(f"{len(found)} records fit {wanted}")
        return found[0].value if found else None

    def distinct(self, field: str) -> list[object]:
        """The values of a field, each once, in order of appearance."""
        return list(dict.fromkeys(getattr(record, field) for record in self._records))

    def save(self, path: Path) -> None:
        """Write a JSON list, one record a line."""
        lines = ",\n".join(json.dumps(asdict(record)) for record in self._records)
        path.write_text(f"[\n{lines}\n]\n" if lines else "[]\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote."""
        return cls(Record(**each) for each in json.loads(path.read_text()))
