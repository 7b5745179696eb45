"""The whole benchmark on a tiny model: records, tables and plots agree with each other."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.errors import ConfigError
from engine import ceilings
from engine.bench.command import Options, run
from engine.bench.records import load, points
from engine.bench.tables import tables
from engine.ceilings import Ceilings
from scheduling.simulator.profiles import Profile

CEILINGS = Ceilings(
    threads=1,
    working_set=2**20,
    read_bandwidth=1e9,
    fp32_flops=1e10,
    bf16_flops=2e10,
    int8_ops=4e10,
)


@pytest.fixture
def ran(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """Runs it on a model of this family; gives the folder of the results."""

    def make(family: str) -> Path:
        def measured(threads: int, working_set: int = 0) -> Ceilings:
            return CEILINGS

        monkeypatch.setattr(ceilings, "measure", measured)
        run(
            Options(
                model=tiny(family).path,
                shape=(),
                dtype=("float32",),
                threads=1,
                repeats=1,
                kv_memory=2**22,
                compare=("transformers", "torch"),
                steps=1,
                plots=True,
                out=tmp_path / "out",
                profile=tmp_path / "profile.json",
            )
        )
        return tmp_path / "out"

    return make


def test_each_pass_is_measured_against_what_the_machine_can_do(
    ran: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = ran("llama")
    records = load(out / "results.json")
    found = points(records)
    assert {point.workload for point in found} == {"prompt", "generation", "mixed"}
    assert all(point.setup.precision == "float32" for point in found)
    for point in found:
        assert point.bytes is not None and point.operations is not None
        assert point.mbu == pytest.approx(point.bytes / point.seconds / 1e9)
        assert point.mfu == pytest.approx(point.operations / point.seconds / 1e10)
        assert point.floor == pytest.approx(max(point.bytes / 1e9, point.operations / 1e10))
        assert 0 < point.fastest_seconds <= point.seconds
    made = tables(records)
    assert set(made) == {"ceilings", "prompts", "batches", "contexts", "cost", "beside"}
    text = (out / "tables.md").read_text()
    assert all(table.markdown() in text for table in made.values())
    assert "Generation at a context of 128 tokens" in capsys.readouterr().out
    for name in ("engine-batch.png", "engine-share.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert Profile.load(out.parent / "profile.json").base >= 0


def test_a_family_whose_work_is_not_counted_is_timed_all_the_same(
    ran: Callable[[str], Path],
) -> None:
    out = ran("opt")
    found = points(load(out / "results.json"))
    assert found and all(point.seconds > 0 for point in found)
    assert {(point.bytes, point.mbu, point.share, point.floor) for point in found} == {
        (None, None, None, None)
    }
    assert not list(out.glob("*.png"))


def test_without_matplotlib_nothing_is_measured(
    ran: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    importing = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return importing(name, *rest)

    def measured(*_: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setattr("engine.bench.command._measure", measured)
    with pytest.raises(ConfigError, match=r"baton-serve\[bench\]"):
        ran("llama")
