"""Compiles what kernels' functions launch, for GPUs that need not be there.

`python -m tests.engine.gpu.compiling` is a process of its own, because Triton decides when it is
imported whether kernels are interpreted. Triton's driver is replaced by one that says which GPU
it has, compiles all the way to machine code, and launches nothing. So a launch is an ordinary call
of a kernel's function, with tensors on torch's "meta" device; a function that looks at values on
the host fails there, as it would in a CUDA graph.

Reads lines "ARCH MODULE NAME", answers each with a line of JSON: a list of kernels, or an error.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

_ROOT = Path(__file__).parents[3]
_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_SHARED = {80: 166912, 90: 232448}  # bytes that a program may have
_REGISTERS = 65536  # of a multiprocessor
_ACCESS = re.compile(r"\b(LDG|STG)\.E\S*?\.(128|64)\b|\b(LDG|STG)\.E")


class AbsentGpu:
    """A Triton driver whose GPU has compute capability `arch` / 10 and takes every launch."""

    def __init__(self) -> None:
        self.arch = 90
        self.launched: list[dict[str, Any]] = []
        self._loaded: dict[str, Any] = {}
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": _SHARED[self.arch]},
            load_binary=self._load,
            unload_module=lambda _: None,
        )

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """Triton keeps what it has compiled per device: each target is one."""
        return self.arch

    def get_current_stream(self, _: int) -> int:
        """None that matters."""
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What Triton calls to launch a kernel that it then loads."""
        found = self._loaded = {"kernel": metadata.name, "shared": metadata.shared}
        return lambda *_: self.launched.append(found)

    def _load(self, name: str, binary: bytes, shared: int, _: int) -> tuple[Any, ...]:
        self._loaded.update(_looked_at(binary))
        return object(), object(), self._loaded["registers"], 0, 1024


def _looked_at(binary: bytes) -> dict[str, Any]:
    """Registers and bytes of stack (where spilled ones go) per thread, and how many loads and
    stores of which width in bits there are in the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [_TOOL, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None
    accesses = Counter(
        f"{match[1] or match[3]}.{match[2] or 'narrow'}" for match in _ACCESS.finditer(text)
    )
    return {"registers": int(usage[1]), "stack": int(usage[2]), "accesses": accesses}


class Compiler:
    """The process; `launched` asks it."""

    def __init__(self) -> None:
        environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name if __spec__ else __name__],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def launched(self, arch: int, module: str, name: str) -> list[dict[str, Any]]:
        """The kernels that `name` of a module in launches/ launches, compiled for sm_`arch`.
        Raises RuntimeError, with the compiler's words, where that fails."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{arch} {module} {name}\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline() or '"the compiler has died"')
        if isinstance(answer, str):
            raise RuntimeError(answer)
        kernels: list[dict[str, Any]] = answer
        return kernels

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def _launch(module: str, name: str) -> None:
    tables = importlib.import_module(f"tests.engine.gpu.launches.{module}")
    launches = tables.LAUNCHES | getattr(tables, "SINCE_SM90", {})
    launches[name]()


def _serve() -> None:
    gpu = AbsentGpu()
    driver.set_active(gpu)
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            arch, module, name = line.split()
            gpu.arch, gpu.launched = int(arch), []
            answer: Any
            try:
                _launch(module, name)
                answer = gpu.launched
            except Exception:
                answer = traceback.format_exc()
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
