"""Measures tile sizes, warps and stages of the kernels, and keeps the fastest as data.

A kernel asks `tuned(kernel, key, default, device)` (engine/gpu/kernels/launch.py) for its
constants. Here that table is replaced by one that notes what a call asks for. Then each constant is
halved and doubled in turn, from the default on, as long as that makes the call faster. What does
not compile, needs more memory than a multiprocessor has, or gives other results than the default,
is passed over.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.gpu.kernels import launch

Constants = dict[str, int]
Timer = Callable[[Callable[[], object]], float]

_GAIN = 0.98  # of the time so far: less is noise
_NEAR = 0.02  # of the largest number, that results may differ by
_LEAST = {"num_warps": 1, "num_stages": 1}
_MOST = {"num_warps": 16, "num_stages": 7}
_ROUNDS = 2
_ANY = "any"  # the key of what holds for every problem


@dataclass(frozen=True, slots=True)
class Ask:
    """One call of `tuned`."""

    kernel: str
    key: str


@dataclass(slots=True)
class Trial:
    """A table of constants that notes what is asked for, and answers with what is being tried."""

    known: dict[str, dict[str, Constants]] = field(default_factory=dict)
    asked: dict[Ask, Constants] = field(default_factory=dict)  # and what was answered
    trying: dict[Ask, Constants] = field(default_factory=dict)

    def get(self, kernel: str, _: object = None) -> _Keys:
        """As of the table of a device."""
        return _Keys(self, kernel)


@dataclass(frozen=True, slots=True)
class _Keys:
    trial: Trial
    kernel: str

    def get(self, key: str, default: Constants) -> Constants:
        """As of a kernel's entries."""
        known = self.trial.known.get(self.kernel, {})
        ask = Ask(self.kernel, key)
        if key != _ANY:  # which was asked for first, as what would stand in for the key
            self.trial.asked.pop(Ask(self.kernel, _ANY), None)
        chosen = self.trial.trying.get(ask) or known.get(key, default)
        self.trial.asked[ask] = chosen
        return chosen


@contextlib.contextmanager
def replaced(trial: Trial) -> Iterator[None]:
    """Kernels ask `trial` meanwhile."""
    before = launch._table
    launch._table = lambda name: trial  # type: ignore[assignment]
    try:
        yield
    finally:
        launch._table = before


def neighbours(constants: Constants) -> Iterator[Constants]:
    """The same with one constant halved or doubled; stages go one by one."""
    for name, value in constants.items():
        steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for step in steps:
            if _LEAST.get(name, 1) <= step <= _MOST.get(name, 2**16):
                yield constants | {name: step}


def climbed(
    start: Constants, measure: Callable[[Constants], float | None]
) -> tuple[Constants, float, float]:
    """The fastest constants that are reached from `start`, their seconds, and those of `start`.
    `measure` gives None for constants that cannot be. Raises RuntimeError if `start` cannot be."""
    first = measure(start)
    if first is None:
        raise RuntimeError(f"the default {start} does not run")
    best, least = start, first
    tried = {tuple(sorted(start.items()))}
    for _ in range(_ROUNDS):
        before = best
        for near in neighbours(before):
            merged = best | {n: v for n, v in near.items() if v != before[n]}
            mark = tuple(sorted(merged.items()))
            if mark in tried:
                continue
            tried.add(mark)
            took = measure(merged)
            if took is not None and took < least * _GAIN:
                best, least = merged, took
        if best == before:
            break
    return best, least, first


def tune(
    calls: dict[str, Callable[[], Any]],
    trial: Trial,
    timer: Timer,
    say: Callable[[str], None],
    time_left: Callable[[], bool] = lambda: True,
) -> None:
    """Find constants for everything that these calls ask for, into `trial.known`."""
    with replaced(trial):
        for name, call in calls.items():
            trial.asked.clear()
            reference = _kept(call())
            for ask, start in dict(trial.asked).items():
                if ask.key in trial.known.get(ask.kernel, {}):
                    continue  # an earlier call asked for the same
                if not time_left():
                    say("no time is left for the others")
                    return
                best, took, before = climbed(start, _measured(call, ask, reference, trial, timer))
                trial.trying.clear()
                trial.known.setdefault(ask.kernel, {})[ask.key] = best
                say(f"{name}: {ask.kernel} {ask.key}: {before / took:.2f}x by {best}")


def _measured(
    call: Callable[[], Any], ask: Ask, reference: Tensor | None, trial: Trial, timer: Timer
) -> Callable[[Constants], float | None]:
    def measure(constants: Constants) -> float | None:
        trial.trying[ask] = constants
        try:
            if not _near(_kept(call()), reference):
                return None
            return timer(call)
        except Exception:  # too much shared memory, or a shape that the compiler refuses
            return None

    return measure


def _kept(result: Any) -> Tensor | None:
    return result.clone() if isinstance(result, Tensor) else None


def _near(found: Tensor | None, reference: Tensor | None) -> bool:
    if found is None or reference is None:
        return True
    if not found.is_floating_point():
        return torch.equal(found, reference)
    apart = (found.float() - reference.float()).abs().max()
    return bool(apart <= _NEAR * reference.float().abs().max().clamp(min=1e-6))


def write(file: Path, known: dict[str, dict[str, Constants]]) -> None:
    """The format of engine/gpu/tuned/."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def read(file: Path) -> dict[str, dict[str, Constants]]:
    """What was written before; empty if nothing was."""
    found: dict[str, dict[str, Constants]] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def device_file(device: torch.device) -> Path:
    """Where the kernels look for this device's constants."""
    return launch._TUNED / f"{launch.device_name(device)}.json"
