"""The search for tile sizes, with a timer that knows what is best."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.tune import Trial, climbed, neighbours, read, replaced, tune, write
from engine.gpu.kernels import launch

Constants = dict[str, int]
START = {"BLOCK": 64, "num_warps": 4, "num_stages": 3}


def distance(best: Constants) -> Callable[[Constants], float]:
    """Seconds that grow with the distance from `best`."""

    def seconds(constants: Constants) -> float:
        return 1 + sum(abs(math.log2(value / best[name])) for name, value in constants.items())

    return seconds


def test_neighbours_differ_in_one_constant_and_stay_in_bounds() -> None:
    found = list(neighbours({"BLOCK": 1, "num_warps": 16, "num_stages": 1}))
    assert found == [
        {"BLOCK": 2, "num_warps": 16, "num_stages": 1},
        {"BLOCK": 1, "num_warps": 8, "num_stages": 1},
        {"BLOCK": 1, "num_warps": 16, "num_stages": 2},
    ]


def test_the_search_climbs_to_constants_two_steps_away() -> None:
    best = {"BLOCK": 256, "num_warps": 8, "num_stages": 4}
    found, took, before = climbed(START, distance(best))
    assert found == best
    assert (took, before) == (1, distance(best)(START))


def test_what_cannot_be_is_passed_over() -> None:
    seconds = distance({"BLOCK": 256, "num_warps": 8, "num_stages": 3})
    found, _, _ = climbed(START, lambda c: None if c["BLOCK"] > 64 else seconds(c))
    assert found == START | {"num_warps": 8}


def test_a_default_that_does_not_run_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not run"):
        climbed(START, lambda constants: None)


class Kernel:
    """Asks for constants as a kernel's function does, and remembers the answer."""

    def __init__(self, key: str, wrong: Constants | None = None) -> None:
        self.key, self.wrong, self.used = key, wrong, START

    def __call__(self) -> torch.Tensor:
        table: Any = launch._table("a device")
        keys = table.get("kernel", {})
        self.used = keys.get(self.key, keys.get("any", START))
        return torch.full((3,), 2.0 if self.used == self.wrong else 1.0)


def test_the_fastest_constants_of_a_call_are_kept_under_its_key() -> None:
    best = {"BLOCK": 32, "num_warps": 4, "num_stages": 3}
    kernel, trial, lines = Kernel("4096"), Trial(), list[str]()
    tune({"a call": kernel}, trial, lambda call: distance(best)(kernel.used), lines.append)
    assert trial.known == {"kernel": {"4096": best}}
    assert lines == [f"a call: kernel 4096: 2.00x by {best}"]


def test_constants_of_every_problem_are_found_under_that_key() -> None:
    kernel, trial = Kernel("any"), Trial()
    tune({"a call": kernel}, trial, lambda call: distance(START)(kernel.used), lambda line: None)
    assert trial.known == {"kernel": {"any": START}}


def test_constants_that_change_the_result_are_not_taken() -> None:
    best = START | {"BLOCK": 32}
    kernel, trial = Kernel("4096", wrong=best), Trial()
    tune({"a call": kernel}, trial, lambda call: distance(best)(kernel.used), lambda line: None)
    assert trial.known == {"kernel": {"4096": START}}


def test_what_is_known_is_not_measured_again_and_nothing_begins_without_time() -> None:
    known = {"kernel": {"4096": START}}
    trial = Trial({"kernel": dict(known["kernel"])})

    def never(call: object) -> float:
        raise AssertionError("measured")

    tune({"a call": Kernel("4096")}, trial, never, lambda line: None)
    tune({"a call": Kernel("1024")}, trial, never, lambda line: None, lambda: False)
    assert trial.known == known


def test_the_kernels_own_table_is_back_afterwards() -> None:
    before = launch._table
    with pytest.raises(KeyError), replaced(Trial()):
        raise KeyError
    assert launch._table is before


def test_the_file_is_what_kernels_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuned" / "nvidia-h200.json"
    assert read(file) == {}
    write(file, {"rms_norm": {"4096": {"num_warps": 8}}})
    assert read(file) == {"rms_norm": {"4096": {"num_warps": 8}}}
    monkeypatch.setattr(launch, "_TUNED", file.parent)
    monkeypatch.setattr(launch, "device_name", lambda device: "nvidia-h200")
    launch._table.cache_clear()
    device = torch.device("cuda")
    assert launch.tuned("rms_norm", "4096", {"num_warps": 4}, device) == {"num_warps": 8}
    assert launch.tuned("rms_norm", "1024", {"num_warps": 4}, device) == {"num_warps": 4}
    launch._table.cache_clear()
