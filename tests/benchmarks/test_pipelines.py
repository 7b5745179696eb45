"""The comparison of pipelines serves everything, in turn, and says what it saw."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engine.executor import ExecutorBroken
from engine.simulated import CostModelExecutor, checksum_token, expected_tokens
from scheduling.plan import Capacity


class Simulated(CostModelExecutor):
    """An executor with a vocabulary."""

    model = SimpleNamespace(vocab_size=1000)

    def __init__(self, depth: int) -> None:
        super().__init__(Capacity(64, 16, 64, 8, 256, depth=depth))


@pytest.fixture
def pipelines(importable: None) -> ModuleType:
    """benchmarks/pipelines.py."""
    return importlib.import_module("benchmarks.pipelines")


def test_layouts_take_turns_at_the_same_requests(pipelines: ModuleType) -> None:
    load, turns = pipelines.Load(sequences=5, prompt=20, tokens=4), []
    executors: dict[str, Any] = {name: Simulated(depth) for name, depth in (("a", 1), ("b", 2))}
    found = pipelines.compare(executors, load, 2, lambda line: turns.append(line[0]))
    assert turns == ["a", "b", "b", "a"]
    for repeat in range(2):
        expected = {
            request.id: list(expected_tokens(request, 0, checksum_token(1000)))
            for request in load.requests(1000, repeat)
        }
        assert found["a"][repeat].outputs == found["b"][repeat].outputs == expected


def test_ratios_are_of_neighbours(pipelines: ModuleType) -> None:
    def runs(*seconds: float) -> list[Any]:
        return [pipelines.Served(each, {"0": [7] * 10, "1": [8] * 10}) for each in seconds]

    first, second = pipelines.report({"one": runs(1.0, 4.0, 2.0), "two": runs(0.5, 3.2, 0.5)})
    assert first == "one: 10.0 tokens/s"
    assert second == "two: 40.0 tokens/s, 2.00 times one; the same in every token: 6 of 6"


@pytest.mark.parametrize("error", [RuntimeError, ExecutorBroken])
def test_a_run_that_is_not_served_ends(pipelines: ModuleType, error: type[Exception]) -> None:
    class Broken(Simulated):
        def execute(self, plan: object) -> Any:
            raise error("the device is on fire")

    load = pipelines.Load(sequences=1, prompt=5, tokens=2)
    with pytest.raises(error):
        pipelines.compare({"a": Broken(1)}, load, 1)
