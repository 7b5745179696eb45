"""Every kernel compiles to machine code for the GPUs that count, with or without one here.

What is launched is in launches/, a file per subject: `LAUNCHES` maps a name to a call of a kernel's
function at the shapes of real models. A launch belongs there for each kernel and for each of its
variants that could fail on its own (formats, head sizes, optional parts); what older GPUs than
Hopper cannot do, such as float8, belongs in `SINCE_SM90`, and what does nothing but move memory
also in `WIDE`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import triton

from tests.engine.gpu.compiling import Compiler

# Bytes of stack per thread. Triton 3.6 keeps up to ten words of four launches there, 3.9 none.
_SPILLED = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 64

_MODULES = sorted(file.stem for file in (Path(__file__).parent / "launches").glob("[!_]*.py"))


def _cases(table: str) -> list[Any]:
    """(module, name) of each launch in `table` of the modules in launches/."""
    return [
        pytest.param(module, name, id=f"{module}-{name}")
        for module in _MODULES
        for name in getattr(
            importlib.import_module(f"tests.engine.gpu.launches.{module}"), table, ()
        )
    ]


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    compiler = Compiler()
    yield compiler
    compiler.close()


@pytest.mark.parametrize(
    ("arch", "module", "name"),
    [
        pytest.param(arch, *case.values, id=f"sm{arch}-{case.id}")
        for arch, table in ((80, "LAUNCHES"), (90, "LAUNCHES"), (90, "SINCE_SM90"))
        for case in _cases(table)
    ],
)
def test_a_launch_compiles_and_spills_nothing(
    compiler: Compiler, arch: int, module: str, name: str
) -> None:
    kernels = compiler.launched(arch, module, name)
    assert kernels, "nothing was launched"
    for kernel in kernels:
        assert kernel["stack"] <= _SPILLED, kernel


@pytest.mark.parametrize(("module", "name"), _cases("WIDE"))
def test_what_moves_memory_moves_16_bytes_at_a_time(
    compiler: Compiler, module: str, name: str
) -> None:
    kernels = compiler.launched(90, module, name)
    for kernel in kernels:
        accesses = kernel["accesses"]
        assert accesses.get("LDG.128", 0) > 0, kernel
        assert accesses.get("STG.128", 0) > 0, kernel
