"""Where kernels are tested: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.gpu.kernels.launch import interpreted

_FORMATS = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Device for the tensors that kernels get."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def rounding() -> Iterator[None]:
    """Let the interpreter round to the nearest, ties to even, and saturate in float8, as GPUs do.

    It cuts digits off on the way to bfloat16, and loses the carry on the way to float8.
    """
    if not interpreted():
        yield
        return
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", _convert)
        _compute_bfloat16(interpreter, patch)
        yield


@pytest.fixture(autouse=True)
def quiet_floats() -> Iterator[None]:
    """Numbers may overflow without a warning, as on a GPU."""
    with np.errstate(all="ignore"):
        yield


def _compute_bfloat16(interpreter: Any, patch: pytest.MonkeyPatch) -> None:
    """Have products of bfloat16, and integers that become it, computed in float32: the
    interpreter would take its bits for numbers."""
    builder, float32 = interpreter.InterpreterBuilder, interpreter.tl.float32
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(operand: Any) -> Any:
        if operand.dtype.name != "bf16":
            return operand
        wide = np.left_shift(operand.data.astype(np.uint32), 16).view(np.float32)
        return interpreter.TensorHandle(wide, float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widened(a), widened(b), *others)

    def create_si_to_fp(self: Any, source: Any, target: Any) -> Any:
        return cast(self, cast(self, source, float32), target)

    patch.setattr(builder, "create_dot", create_dot)
    patch.setattr(builder, "create_si_to_fp", create_si_to_fp)


def _convert(numbers: NDArray[Any], source: Any, target: Any, _: object) -> NDArray[Any]:
    """The bits of `numbers`, which are those of `source`, in the format `target`."""
    bits = torch.from_numpy(np.array(numbers, order="C").view(f"i{numbers.dtype.itemsize}"))
    wide = bits.view(_FORMATS[source.name]).float()
    found = _FORMATS[target.name]
    if found is torch.float8_e4m3fn:
        wide = wide.clamp(-448, 448)
    rounded = wide.to(found)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
    array: NDArray[Any] = rounded.view(integers).numpy()
    return array.view(f"u{found.itemsize}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
