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
    requirements are passed over, NAME-unwanted.txt those that are taken out again. pip's output
    goes to NAME.log beside it.

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
        for file, verb in _files(name):
            done = subprocess.run(
                [python, "-m", "pip", *verb, "--disable-pip-version-check", "-r", file],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)},
            )
            if done.returncode:
                raise PeerError(f"pip could not install it here: {_error(log)} ({log})")
    stamp.write_text(wanted)
    return python


def _files(name: str) -> list[tuple[Path, tuple[str, ...]]]:
    """Files of requirements, each with what pip is to do with it, in this order."""
    files = {
        f"{name}.txt": ("install",),
        f"{name}-no-deps.txt": ("install", "--no-deps"),
        f"{name}-unwanted.txt": ("uninstall", "--yes"),
    }
    found = [(_REQUIREMENTS / file, verb) for file, verb in files.items()]
    return [(file, verb) for file, verb in found if file.is_file()]


def _hash(name: str) -> str:
    digest = hashlib.sha256(sys.version.encode())
    for file, _ in _files(name):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _error(log: Path) -> str:
    """The first line that says what went wrong."""
    lines = log.read_text(errors="replace").splitlines()
    return next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "")
