"""The benchmarks are no installed package: they are imported from the source tree."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import benchmarks` works."""
    monkeypatch.syspath_prepend(str(ROOT))
