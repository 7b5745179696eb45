"""The library is declared in Python as its header declares it, and says why it is not used."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import logging
import re
from collections.abc import Iterator
from ctypes import c_double, c_float, c_int32, c_int64, c_uint32, c_uint64
from enum import IntEnum
from pathlib import Path

import pytest

from baton.errors import ConfigError, ModelError
from engine.native import library
from engine.native.library import (
    Activation,
    BatchView,
    DrawsView,
    Format,
    Isa,
    Library,
    Matrix,
    ReportsView,
    Shape,
    Times,
    Vector,
    load,
)
from tests.engine.conftest import COMPILED

_SOURCE = Path(library.__file__).parent / "src" / "baton.h"
_SCALARS = {
    "uint32_t": c_uint32,
    "uint64_t": c_uint64,
    "int32_t": c_int32,
    "int64_t": c_int64,
    "float": c_float,
    "double": c_double,
}


@pytest.fixture(scope="module")
def header() -> str:
    """baton.h on one line, without comments."""
    if not _SOURCE.exists():
        pytest.skip("the sources are not here")
    return " ".join(re.sub(r"//.*", "", _SOURCE.read_text()).split())


@pytest.mark.parametrize("kind", [Format, Isa, Activation, Matrix, Vector])
def test_enumerations_are_those_of_the_header(kind: type[IntEnum], header: str) -> None:
    found = re.search(rf"enum Baton{kind.__name__} : int32_t {{(.*?)}}", header)
    assert found is not None
    entries = dict(re.findall(r"BATON_(\w+) = (\d+)", found[1]))
    assert {member.name: str(member.value) for member in kind} == entries


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Shape, "Shape"),
        (BatchView, "Batch"),
        (DrawsView, "Draws"),
        (ReportsView, "Reports"),
        (Times, "Times"),
    ],
)
def test_structures_are_those_of_the_header(
    kind: type[ctypes.Structure], name: str, header: str
) -> None:
    found = re.search(rf"struct Baton{name} {{(.*?)}}", header)
    assert found is not None
    fields: list[tuple[str, type]] = []
    for declaration in filter(None, map(str.strip, found[1].split(";"))):
        scalar, _, names = declaration.removeprefix("const ").partition(" ")
        for one in names.split(","):
            pointer = "*" in declaration
            base = one.replace("*", "").strip()
            fields.append((base, ctypes.c_void_p if pointer else _SCALARS[scalar.rstrip("*")]))
    assert [(field[0], field[1]) for field in kind._fields_] == fields


def test_functions_are_those_of_the_header(header: str) -> None:
    declared = dict(re.findall(r"BATON_EXPORT [\w ]+[ *]+(baton_\w+)\((.*?)\);", header))
    signatures = library._SIGNATURES
    assert set(signatures) == set(declared)
    for name, arguments in declared.items():
        kinds = [a for a in arguments.split(",") if a.strip()]
        assert len(signatures[name][1]) == len(kinds), name
        for argument, kind in zip(kinds, signatures[name][1], strict=True):
            scalar = argument.split()[0]
            assert kind is _SCALARS.get(scalar, kind) or "*" in argument, f"{name}: {argument}"


@pytest.fixture
def _unloaded() -> Iterator[None]:
    load.cache_clear()
    yield
    load.cache_clear()


@pytest.mark.usefixtures("_unloaded")
def test_there_is_none_where_none_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load() is None


@pytest.mark.usefixtures("_unloaded")
def test_a_library_that_cannot_be_loaded_is_none_and_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "_library.so"
    broken.write_bytes(b"no library")
    spec = importlib.machinery.ModuleSpec("_library", None, origin=str(broken))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with caplog.at_level(logging.WARNING):
        assert load() is None
    assert str(broken) in caplog.text


@COMPILED
@pytest.mark.usefixtures("_unloaded")
def test_a_library_of_another_header_than_the_one_here_is_none_and_logged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newer = tmp_path / "baton.h"
    newer.write_text(_SOURCE.read_text() + "// and one more field")
    monkeypatch.setattr(library, "_HEADER", newer)
    with caplog.at_level(logging.WARNING):
        assert load() is None
    assert "built from other sources" in caplog.text


@COMPILED
@pytest.mark.usefixtures("_unloaded")
def test_a_library_without_its_header_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_HEADER", tmp_path / "baton.h")
    assert load() is not None


@pytest.fixture
def loaded() -> Library:
    """The library that was built."""
    found = load()
    assert found is not None
    return found


@COMPILED
def test_every_instruction_set_up_to_the_best_can_be_chosen(loaded: Library) -> None:
    assert loaded.isa_called("auto") is loaded.isa
    for isa in Isa:
        name = isa.name.lower()
        if isa <= loaded.isa:
            assert loaded.isa_called(name) is isa
        else:
            with pytest.raises(ConfigError, match=f"--instruction-set {name}"):
                loaded.isa_called(name)
        assert loaded.isa_name(isa)


@COMPILED
def test_failures_come_with_the_reason_that_the_library_gives(loaded: Library) -> None:
    shape = Shape(layers=1, hidden=-16, intermediate=16, heads=1, kv_heads=1, head_dim=16)
    team = loaded.functions.baton_team_new(1, None)
    assert loaded.functions.baton_model_new(ctypes.byref(shape), team, 0) is None
    assert loaded.error()
    with pytest.raises(ModelError, match=re.escape(loaded.error())):
        loaded.check(-1)
    loaded.functions.baton_team_free(team)
