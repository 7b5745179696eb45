"""Where kernels run, and with which tile sizes.

Tile sizes are data (engine/gpu/tuned/*.json), measured by `python -m benchmarks.gpu tune` on the
device that the file is named after; a device without a file takes the defaults of the kernel.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import triton

from baton.errors import ConfigError

# Products and sums may be fused, as by every compiler of CUDA. Triton 3.9 wants to be told.
triton.knobs.language.default_fp_fusion = True

_TUNED = Path(__file__).parent.parent / "tuned"


def interpreted() -> bool:
    """True if kernels run in Triton's interpreter: TRITON_INTERPRET=1 when Triton was imported."""
    return bool(triton.knobs.runtime.interpret)


def architecture() -> int:
    """Ten times the compute capability that kernels are compiled for, such as 90; 0 in the
    interpreter."""
    return 0 if interpreted() else int(triton.runtime.driver.active.get_current_target().arch)


def require(device: torch.device) -> None:
    """Raise ConfigError unless kernels can run on tensors of `device`."""
    if device.type == "cuda" or (device.type == "cpu" and interpreted()):
        return
    raise ConfigError(
        f"--attention-backend triton: needs a GPU, not --device {device} (on a CPU, only tests run "
        "it, with TRITON_INTERPRET=1)"
    )


def tuned(kernel: str, key: str, default: dict[str, int], device: torch.device) -> dict[str, int]:
    """Compile-time constants, `num_warps` and `num_stages` for `kernel` at the problem `key`."""
    if device.type != "cuda":
        return default
    found = _table(device_name(device)).get(kernel, {})
    chosen: dict[str, int] = found.get(key, found.get("any", default))
    return chosen


def device_name(device: torch.device) -> str:
    """The device's name as files spell it: "NVIDIA H100 80GB HBM3" is nvidia-h100-80gb-hbm3."""
    return str(torch.cuda.get_device_name(device)).lower().replace(" ", "-")


@functools.cache
def _table(name: str) -> dict[str, Any]:
    file = _TUNED / f"{name}.json"
    if not file.is_file():
        return {}
    table: dict[str, Any] = json.loads(file.read_text())
    return table
