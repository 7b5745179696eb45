"""One model in the compiled library: its packed weights, the threads that run it, its passes."""

from __future__ import annotations

import ctypes
import weakref
from ctypes import c_void_p

import torch
from torch import Tensor

from baton.errors import ModelError
from engine.native.library import (
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
)

FORMATS = {
    torch.float32: Format.F32,
    torch.bfloat16: Format.BF16,
    torch.float16: Format.F16,
}


class CompiledStep:
    """Owns a BatonModel and its BatonTeam until it is collected. One thread at a time."""

    def __init__(self, library: Library, shape: Shape, *, threads: int, isa: Isa) -> None:
        """Every matrix of `shape` is to be packed, every vector it needs given, and the embedding.

        Raises ModelError where the library cannot serve the shape.
        """
        self._library = library
        self._functions = library.functions
        self._held: list[Tensor] = []  # what the library reads where it lies
        team = c_void_p(self._functions.baton_team_new(threads, None))
        if not team:
            raise ModelError(f"compiled backend: {threads} threads: {library.error()}")
        self._model = c_void_p(self._functions.baton_model_new(ctypes.byref(shape), team, isa))
        if not self._model:
            reason = library.error()
            self._functions.baton_team_free(team)
            raise ModelError(f"compiled backend: {reason}")
        self._team, self._isa = team, isa
        weakref.finalize(self, _free, self._functions, self._model, team)

    def pack(self, layer: int, matrix: Matrix, first: int, weight: Tensor) -> None:
        """Pack rows of a matrix, [rows, in], from row `first` of it on."""
        weight = _readable(weight)
        self._library.check(
            self._functions.baton_model_pack(
                self._model,
                layer,
                matrix,
                first,
                len(weight),
                weight.data_ptr(),
                FORMATS[weight.dtype],
            )
        )

    def vector(self, layer: int, vector: Vector, first: int, values: Tensor) -> None:
        """Copy a part of a vector, from number `first` of it on."""
        values = values.float().contiguous()
        self._library.check(
            self._functions.baton_model_vector(
                self._model, layer, vector, first, len(values), values.data_ptr()
            )
        )

    def embedding(self, table: Tensor) -> None:
        """The embedding, [vocabulary, hidden], which is read where it lies."""
        table = _readable(table)
        self._held.append(table)
        self._library.check(
            self._functions.baton_model_embedding(
                self._model, table.data_ptr(), FORMATS[table.dtype]
            )
        )

    def window(self, layer: int, window: int) -> None:
        """The sliding window of a layer, in positions."""
        self._library.check(self._functions.baton_model_window(self._model, layer, window))

    @property
    def packed_bytes(self) -> int:
        """Memory that the packed weights take."""
        return int(self._functions.baton_model_bytes(self._model))

    def run(self, batch: BatchView, times: Times | None = None) -> None:
        """One pass; other Python threads go on meanwhile. Raises RuntimeError if it fails."""
        if self._functions.baton_step(self._model, batch, times) != 0:
            raise RuntimeError(f"compiled backend: {self._library.error()}")

    def use(self, threads: int) -> None:
        """Let so many of its threads take part from now on, at least one; the others sleep."""
        self._functions.baton_team_use(self._team, threads)

    def report(self, reports: ReportsView) -> None:
        """Log probabilities, on the same threads. Raises RuntimeError if that fails."""
        if self._functions.baton_report(self._team, self._isa, reports) != 0:
            raise RuntimeError(f"compiled backend: {self._library.error()}")

    def sample(self, draws: DrawsView) -> None:
        """Choose tokens, on the same threads. Raises RuntimeError if that fails."""
        if self._functions.baton_sample(self._team, self._isa, draws) != 0:
            raise RuntimeError(f"compiled backend: {self._library.error()}")


def _free(functions: ctypes.CDLL, model: c_void_p, team: c_void_p) -> None:
    functions.baton_model_free(model)
    functions.baton_team_free(team)


def _readable(weight: Tensor) -> Tensor:
    """`weight` in a format that the library reads."""
    return (weight if weight.dtype in FORMATS else weight.float()).contiguous()
