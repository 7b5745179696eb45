"""Environments of the other systems, made with pip: their pins clash with ours."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.peers.process import PeerError

_REQUIREMENTS = Path(__file__).parent / "requirements"
_STAMP = "installed"  # file in an environment: the hash of what is installed in it


def environment(name: str, cache: Path) -> Path:
    """The python of the environment called `name`, made if it is not there or no longer what is
    asked for. requirements/NAME.txt lists its packages, NAME-no-deps.txt those whose own
    requirements are passed over. pip's output goes to NAME.log beside it.

    Raises PeerError if pip fails.
    """
    directory = cache / "environments" / name
    python = directory / "bin" / "python"
    wanted = _hash(name)
    stamp = directory / _STAMP
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    log = directory.with_suffix(".log")
    with log.open("wb") as output:
        for file, flags in _files(name):
            command = [python, "-m", "pip", "install", "--disable-pip-version-check", *flags]
            done = subprocess.run(
                [*command, "-r", file],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)},
            )
            if done.returncode:
                raise PeerError(f"pip could not install it here: {_error(log)} ({log})")
    stamp.write_text(wanted)
    return python


def _files(name: str) -> list[tuple[Path, tuple[str, ...]]]:
    bare = _REQUIREMENTS / f"{name}-no-deps.txt"
    files: list[tuple[Path, tuple[str, ...]]] = [(_REQUIREMENTS / f"{name}.txt", ())]
    return [*files, (bare, ("--no-deps",))] if bare.is_file() else files


def _hash(name: str) -> str:
    digest = hashlib.sha256(sys.version.encode())
    for file, _ in _files(name):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _error(log: Path) -> str:
    """The first line that says what went wrong."""
    lines = log.read_text(errors="replace").splitlines()
    return next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "")
