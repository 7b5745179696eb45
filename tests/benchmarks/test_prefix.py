"""The benchmark of the prefix cache counts what must be computed, by the lengths alone."""

from __future__ import annotations

import importlib

import demo_model
from engine.load import load_executor


def test_with_the_cache_each_turn_computes_what_is_new(importable: None) -> None:
    prefix = importlib.import_module("benchmarks.prefix")
    executor = load_executor(demo_model.path(), threads=1, kv_memory=2**24, block_size=8)
    talk = prefix.Talk(conversations=2, turns=2, system=32, question=7, answer=9)
    try:
        (without,), (with_it,) = prefix.compare(executor, talk, repeats=1)
    finally:
        executor.close()
    first, second = 32 + 7, 32 + 7 + 9 + 7
    assert without.computed == 2 * (first + second)
    # The first turns come at once and share nothing yet. Of the second, 47 tokens are known, all
    # but the last one of the answer, and of these five blocks.
    assert with_it.computed == 2 * (first + second - 40)
    for measured in (without, with_it):
        assert len(measured.first_tokens) == 4
        assert [len(answer) for answer in measured.answers] == [second + 9] * 2
