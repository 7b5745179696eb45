"""The compiled library: where it is, and its functions as src/baton.h declares them.

Everything goes through ctypes, which lets other Python threads run while a call lasts. Knows
nothing about models; model.py does.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path

from baton.errors import ConfigError, ModelError

_logger = logging.getLogger(__name__)

_HEADER = Path(__file__).parent / "src" / "baton.h"  # not there where only the built package is


class Format(IntEnum):
    """BatonFormat: how numbers are stored."""

    F32 = 0
    BF16 = 1
    F16 = 2
    INT8 = 3
    INT4 = 4


class Isa(IntEnum):
    """BatonIsa: the instruction sets that there are kernels for, each with those before it."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4


class Activation(IntEnum):
    """BatonActivation."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3


class Matrix(IntEnum):
    """BatonMatrix: the matrices of a layer, and the head."""

    QKV = 0
    OUTPUT = 1
    GATE_UP = 2
    DOWN = 3
    HEAD = 4


class Vector(IntEnum):
    """BatonVector: the norms and biases of a layer, and the last norm."""

    INPUT_NORM = 0
    MLP_NORM = 1
    Q_NORM = 2
    K_NORM = 3
    QKV_BIAS = 4
    OUTPUT_BIAS = 5
    GATE_UP_BIAS = 6
    DOWN_BIAS = 7
    FINAL_NORM = 8


class Shape(Structure):
    """BatonShape."""

    _fields_ = (
        ("layers", c_int32),
        ("hidden", c_int32),
        ("intermediate", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("vocabulary", c_int32),
        ("activation", c_int32),
        ("weights", c_int32),
        ("head", c_int32),
        ("kv", c_int32),
        ("block_size", c_int32),
        ("max_tokens", c_int32),
        ("eps", c_float),
        ("scale", c_float),
    )


class BatchView(Structure):
    """BatonBatch: addresses of one pass's arrays, which must live until the pass is over."""

    _fields_ = (
        ("tokens", c_int32),
        ("sequences", c_int32),
        ("rows", c_int32),
        ("width", c_int32),
        ("token_ids", c_void_p),
        ("slots", c_void_p),
        ("starts", c_void_p),
        ("lengths", c_void_p),
        ("tables", c_void_p),
        ("rotations", c_void_p),
        ("rotation_rows", c_void_p),
        ("logit_rows", c_void_p),
        ("logit_targets", c_void_p),
        ("kv", c_void_p),
        ("logits", c_void_p),
        ("best", c_void_p),
        ("best_logits", c_void_p),
    )


class DrawsView(Structure):
    """BatonDraws: addresses of one call's arrays, which must live until it is over."""

    _fields_ = (
        ("rows", c_int32),
        ("vocabulary", c_int32),
        ("logits", c_void_p),
        ("temperatures", c_void_p),
        ("top_ks", c_void_p),
        ("top_ps", c_void_p),
        ("min_ps", c_void_p),
        ("seeds", c_void_p),
        ("streams", c_void_p),
        ("positions", c_void_p),
        ("tokens", c_void_p),
    )


class ReportsView(Structure):
    """BatonReports: addresses of one call's arrays, which must live until it is over."""

    _fields_ = (
        ("rows", c_int32),
        ("vocabulary", c_int32),
        ("width", c_int32),
        ("logits", c_void_p),
        ("places", c_void_p),
        ("targets", c_void_p),
        ("counts", c_void_p),
        ("shares", c_void_p),
        ("ranks", c_void_p),
        ("top_tokens", c_void_p),
        ("top_shares", c_void_p),
    )


class Times(Structure):
    """BatonTimes: seconds of a pass by part."""

    _fields_ = (
        ("embed", c_double),
        ("norm", c_double),
        ("qkv", c_double),
        ("rope", c_double),
        ("attention", c_double),
        ("output", c_double),
        ("gate_up", c_double),
        ("down", c_double),
        ("head", c_double),
        ("sync", c_double),
    )


_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "baton_error": (c_char_p, ()),
    "baton_abi": (c_char_p, ()),
    "baton_isa": (c_int32, ()),
    "baton_isa_name": (c_char_p, (c_int32,)),
    "baton_team_new": (c_void_p, (c_int32, POINTER(c_int32))),
    "baton_team_free": (None, (c_void_p,)),
    "baton_team_use": (None, (c_void_p, c_int32)),
    "baton_model_new": (c_void_p, (POINTER(Shape), c_void_p, c_int32)),
    "baton_model_free": (None, (c_void_p,)),
    "baton_model_pack": (
        c_int32,
        (c_void_p, c_int32, c_int32, c_int64, c_int64, c_void_p, c_int32),
    ),
    "baton_model_vector": (c_int32, (c_void_p, c_int32, c_int32, c_int64, c_int64, c_void_p)),
    "baton_model_embedding": (c_int32, (c_void_p, c_void_p, c_int32)),
    "baton_model_window": (c_int32, (c_void_p, c_int32, c_int32)),
    "baton_model_bytes": (c_int64, (c_void_p,)),
    "baton_step": (c_int32, (c_void_p, POINTER(BatchView), POINTER(Times))),
    "baton_multiply": (
        c_int32,
        (
            c_void_p, c_int32, c_int32, c_int64, c_int64, c_int64,
            c_void_p, c_void_p, c_void_p, c_int32, c_void_p,
        ),
    ),
    "baton_sample": (c_int32, (c_void_p, c_int32, POINTER(DrawsView))),
    "baton_report": (c_int32, (c_void_p, c_int32, POINTER(ReportsView))),
    "baton_read_bandwidth": (c_double, (c_void_p, c_int64, c_int32)),
}  # fmt: skip


class Library:
    """The functions of one loaded library."""

    def __init__(self, path: Path) -> None:
        """Raises OSError or AttributeError if the file is none, ValueError if it was built from
        another baton.h than the one that is here."""
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.functions, name)
            function.restype, function.argtypes = result, arguments
        abi: bytes = self.functions.baton_abi()
        if _HEADER.exists() and abi.decode() != _abi_of(_HEADER):
            raise ValueError("built from other sources than these; build it again (make install)")
        self.isa = Isa(self.functions.baton_isa())  # the best one of this machine

    def isa_name(self, isa: Isa) -> str:
        """As the library calls it."""
        name: bytes = self.functions.baton_isa_name(isa)
        return name.decode()

    def error(self) -> str:
        """Why the last call of this thread failed."""
        text: bytes | None = self.functions.baton_error()
        return (text or b"unknown error").decode(errors="replace")

    def check(self, code: int) -> None:
        """Raise ModelError if `code`, a function's result, says that it failed."""
        if code != 0:
            raise ModelError(f"compiled backend: {self.error()}")

    def isa_called(self, name: str) -> Isa:
        """The instruction set to use: the machine's best for "auto", else that of the name.

        Raises ConfigError where the machine lacks it.
        """
        wanted = self.isa if name == "auto" else Isa[name.upper()]
        if wanted > self.isa:
            raise ConfigError(
                f"--instruction-set {name}: this machine has {self.isa_name(self.isa)}"
            )
        return wanted


def _abi_of(header: Path) -> str:
    """As setup.py names it."""
    return hashlib.sha256(header.read_bytes()).hexdigest()[:16]


@functools.cache
def load() -> Library | None:
    """The library, or None where it was not built or cannot be loaded (logged, once)."""
    found = importlib.util.find_spec("engine.native._library")
    if found is None or found.origin is None:
        return None
    try:
        return Library(Path(found.origin))
    except (OSError, AttributeError, ValueError) as error:
        _logger.warning("compiled backend: %s: %s", found.origin, error)
        return None
