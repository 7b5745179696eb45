"""Gathers one value per seed of every metric while an experiment runs, and makes records of
them."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.records import EngineName, Record
from experiments.stats import Interval, interval, ratio


@dataclass(frozen=True, slots=True)
class Point:
    """Where something is measured. Fields as in `Record`."""

    policy: str
    load: float | None = None
    axis: str = ""
    at: float | None = None


class Samples:
    """The values of one experiment on one engine, by point and metric, in the order of seeds."""

    def __init__(self, experiment: str, engine: EngineName) -> None:
        self._experiment = experiment
        self._engine: EngineName = engine
        self._values: dict[tuple[Point, str], list[float]] = {}
        self._ratios: list[Record] = []

    def add(self, point: Point, **metrics: float) -> None:
        """One seed's values at a point."""
        for metric, value in metrics.items():
            self._values.setdefault((point, metric), []).append(value)

    def values(self, point: Point, metric: str) -> list[float]:
        """One value per seed. Raises KeyError if nothing was measured there."""
        return self._values[point, metric]

    def compare(self, over: Point, under: Point, metric: str) -> None:
        """Also report how many times `over` is `under`, seed by seed: the record has the load of
        `over` and the axis of whichever has one, the policy "over / under" and the metric with
        "_ratio" added."""
        found = ratio(self.values(over, metric), self.values(under, metric))
        swept = over if over.axis else under
        pair = Point(f"{over.policy} / {under.policy}", over.load, swept.axis, swept.at)
        self._ratios.append(self._record(pair, f"{metric}_ratio", found))

    def records(self) -> list[Record]:
        """Means with their intervals, then the ratios."""
        means = [
            self._record(point, metric, interval(values))
            for (point, metric), values in self._values.items()
        ]
        return means + self._ratios

    def _record(self, point: Point, metric: str, found: Interval) -> Record:
        return Record.of(
            self._experiment,
            self._engine,
            point.policy,
            metric,
            found,
            load=point.load,
            axis=point.axis,
            at=point.at,
        )
