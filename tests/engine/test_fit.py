"""The cost model that is fitted to measured passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

from engine.fit import fit
from engine.load import load_executor
from scheduling.simulator.profiles import Profile


def test_every_kind_of_work_is_measured_and_the_profile_survives_its_file(
    tiny: Callable[..., Any], tmp_path: Any
) -> None:
    executor = load_executor(
        tiny("llama").path, threads=1, max_batch_tokens=128, host_kv_memory=2**18
    )
    said: list[str] = []
    try:
        found = fit(executor, "tiny", repeats=1, progress=said.append)
    finally:
        executor.close()
    works = [record.work for record in found.records]
    assert len(set(works)) == len(works)
    assert {(w.prompt_tokens > 0, w.sequences > 0) for w in works} == {
        (True, False),
        (False, True),
        (True, True),
    }
    assert max(w.prompt_tokens + w.sequences for w in works) <= 128
    assert min(astuple(found.profile.cost)) >= 0
    assert min(r.seconds for r in found.records) > 0
    assert 0 <= found.median_error <= max(found.errors)
    profile = found.profile
    assert profile.swap_seconds_per_block > 0
    assert (profile.block_bytes, profile.blocks) == (
        executor.pool.block_bytes,
        executor.capacity.blocks,
    )
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    assert said


def test_without_host_memory_swaps_are_not_measured(tiny: Callable[..., Any]) -> None:
    executor = load_executor(tiny("llama").path, threads=1, max_batch_tokens=64)
    assert fit(executor, "tiny", repeats=1).profile.swap_seconds_per_block == 0
