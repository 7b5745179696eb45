"""What an experiment is made of, and what it is given to run with."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from experiments.records import EngineName, Record, Results

T = TypeVar("T")


class Progress(Protocol):
    """Told how far an experiment is."""

    def expect(self, trials: int) -> None:
        """So many more trials are to come."""
        ...

    def done(self, text: str) -> None:
        """One of them has ended; `text` says which."""
        ...


class Silent:
    """Progress that nobody watches."""

    def expect(self, trials: int) -> None:
        """Nothing."""

    def done(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Run:
    """One engine, with seeds and size, for one or more experiments.

    `shared` is common to all experiments of one command and one engine: what several of them
    need is measured once.
    """

    engine: EngineName
    seeds: tuple[int, ...]
    quick: bool = False
    progress: Progress = field(default_factory=Silent)
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def sized(self, full: T, quick: T) -> T:
        """One of two sizes."""
        return quick if self.quick else full

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returned for this key the first time."""
        if key not in self.shared:
            self.shared[key] = make()
        found: T = self.shared[key]
        return found


@dataclass(frozen=True, slots=True)
class Bar:
    """A claim that a run confirms or not: `value` has to be at least, or at most, `limit`."""

    claim: str
    engine: EngineName
    value: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether it holds."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def wanted(self) -> str:
        """The limit, with its sign."""
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a header; the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def no_plots(results: Results, folder: Path) -> list[Path]:
    """For experiments that draw nothing."""
    return []


def no_bars(results: Results) -> list[Bar]:
    """For experiments without a bar to reach."""
    return []


def no_tables(results: Results) -> list[Table]:
    """For experiments that print nothing."""
    return []


Measure = Callable[[Run], Sequence[Record]]
Draw = Callable[[Results, Path], list[Path]]
Bars = Callable[[Results], list[Bar]]
Tables = Callable[[Results], list[Table]]


@dataclass(frozen=True, slots=True)
class Experiment:
    """`name` as in `--only` ("B1"). `measure` runs it on one engine. The other functions see the
    results of all experiments and engines so far, and take their own from them; they must cope
    with results that lack an engine, a policy or all of it.

    `draw` writes PNG files into a folder and returns their paths; `bars` compares with what is
    wanted; `tables` are printed and go into docs/experiments.md.
    """

    name: str
    title: str
    engines: tuple[EngineName, ...]
    measure: Measure
    draw: Draw = no_plots
    bars: Bars = no_bars
    tables: Tables = no_tables
