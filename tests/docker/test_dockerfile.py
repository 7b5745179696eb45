"""The image: what hadolint says of it, and that it holds what the project is made of."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


def packages() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["packages"]["find"]["include"]
    return {pattern.rstrip("*") for pattern in patterns}


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).with_name("hadolint")
    result = subprocess.run(
        [str(hadolint), "--failure-threshold=info", str(DOCKERFILE)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_package_is_copied_and_let_through():
    copied = set(re.findall(r"^COPY (\w+) \1$", DOCKERFILE.read_text(), re.MULTILINE))
    assert copied == packages()
    let_through = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    build = {"constraints.txt", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md"}
    assert let_through == packages() | build


def test_what_is_copied_is_there():
    for line in DOCKERFILE.read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for name in line.split()[1:-1]:
                assert (ROOT / name).exists(), name


def test_it_runs_as_nobody_in_particular():
    lines = DOCKERFILE.read_text().splitlines()
    assert lines.index("USER 10001:0") > max(
        number for number, line in enumerate(lines) if line.startswith(("RUN", "FROM"))
    )
    assert 'ENTRYPOINT ["baton"]' in lines
