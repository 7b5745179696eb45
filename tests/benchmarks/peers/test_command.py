"""The command line: names are checked before anything is installed or run."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.peers.command import main
from benchmarks.peers.installing import _files
from benchmarks.peers.registry import MODES, PEERS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("option", "known"),
    [("--peers", "openvino"), ("--modes", "grpc"), ("--shapes", "0.5b"), ("--precision", "int8")],
)
def test_unknown_names_are_refused_with_those_that_there_are(
    option: str, known: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(main, [option, "nonsense", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "nonsense" in result.output
    assert known in result.output
    assert not (tmp_path / "out").exists()


def test_without_any_system_there_is_nothing_to_do() -> None:
    result = CliRunner().invoke(main, ["--peers", "", "--modes", ""])
    assert result.exit_code == 2
    assert "at least one" in result.output


def test_every_system_has_its_script_and_its_requirements() -> None:
    systems = [*PEERS.values(), *(system for mode in MODES.values() for system in mode)]
    for system in systems:
        assert (ROOT / "benchmarks" / "peers" / "systems" / system.script).is_file()
        assert not system.environment or _files(system.environment)
