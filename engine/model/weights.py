"""Tensors from safetensors files, by name, checked and converted; and what identifies them.

Never pickle: config.py refuses directories without safetensors before this module sees them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from baton.errors import ModelError
from engine.model.mapped import MappedFile
from engine.quantization.checkpoints import SCALE_SUFFIXES, QuantizedWeights
from engine.quantization.groupwise import Fp8Quantized, GroupQuantized
from engine.quantization.reader import Files
from engine.quantization.scheme import OTHER_FILES, Scheme, read_scheme
from engine.quantization.window import Window, span

_INDEX = "model.safetensors.index.json"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SAMPLES = 64  # places of each file that the fingerprint looks at
_SAMPLE_BYTES = 4096


class Checkpoint:
    """The tensors of a model directory, mapped into memory and read on demand, in `dtype` on
    `device`. Weights that are stored quantized are given as what they mean.

    Raises ModelError if a file is missing, truncated or no safetensors file, or if the quantization
    is not supported.
    """

    def __init__(
        self, path: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """`dtype` None: that of the first floating-point tensor."""
        self.path = path
        self.files = _files(path)
        self._readers: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        for file in self.files:
            try:
                reader: Any = safe_open(file, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file}: damaged or incomplete: {error}") from error
            self._readers[file] = reader
            self._where |= dict.fromkeys(reader.keys(), file)
        self._maps: dict[Path, MappedFile] = {}
        self.scheme: Scheme | None = read_scheme(path)
        self._quantized: QuantizedWeights | None = None
        if self.scheme is not None:
            files = Files(path, self._where.keys(), self._view, self._dtype)
            self._quantized = QuantizedWeights(files, self.scheme)
        self.dtype = dtype or self._stored_dtype()
        self.device = device

    def __contains__(self, name: str) -> bool:
        return name in self._where or self.is_quantized(name)

    def is_quantized(self, name: str) -> bool:
        """Whether weight `name` is stored quantized."""
        return self._quantized is not None and name in self._quantized

    def quantized(
        self, name: str, out: int, into: int, window: Window | None = None
    ) -> GroupQuantized | Fp8Quantized | None:
        """Weight `name` [out, in], or a window of it, as it is stored, on `device`, for products
        that can use that.

        None if it is not quantized, or in a form that only dense weights can have. Raises as a
        call does.
        """
        if self._quantized is None or name not in self._quantized:
            return None
        found = self._quantized.quantized(name, out, into, window)
        return None if found is None else found.to(self.device)

    def with_all_inputs(self, name: str, out: int, into: int) -> tuple[Tensor, range]:
        """Weight `name` [out, in] as a call gives it, but with all inputs that the model has there,
        and which of them the call gives: one rank's, say, whose scales shall be those of the whole.
        Raises as a call does."""
        return self(name, out, into), range(into)

    def _stored_dtype(self) -> torch.dtype:
        for name in self._where:
            dtype = self._read(name).dtype
            if dtype in _FLOATS and not name.endswith(SCALE_SUFFIXES):
                return dtype
        raise ModelError(f"{self.path}: has no floating-point tensor")

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A copy of tensor `name` in memory of its own.

        Raises ModelError if it is missing, has another shape, or holds no plain floats and is no
        sound quantized weight.
        """
        if self._quantized is not None and name in self._quantized:
            return self._quantized.dense(name, *shape).to(device=self.device, dtype=self.dtype)
        if name not in self._where:
            raise ModelError(f"{self.path}: tensor {name!r} is missing")
        found = self._read(name)
        self._check(name, tuple(found.shape), shape, found.dtype)
        return found.to(device=self.device, dtype=self.dtype, copy=True)

    def dense(self) -> dict[str, Tensor]:
        """All tensors by their names, of quantized weights what they mean, in memory of their own.
        Raises ModelError as a call does."""
        names = list(self._where) if self._quantized is None else self._quantized.names(self._where)
        found = {}
        for name in names:
            floats = self.is_quantized(name) or self._dtype(name) in _FLOATS
            shape = self.stored_shape(name)
            found[name] = self(name, *shape) if floats else self._read(name).to(self.device)
        return found

    def mapped(self, name: str, *shape: int, window: Window | None = None) -> Tensor:
        """Tensor `name`, or a window of it, where it lies in the file, in its stored dtype; never
        write to it.

        It stays mapped for as long as the tensor lives. A quantized weight is a float32 tensor in
        memory of its own. Raises as a call does.
        """
        if self._quantized is not None and name in self._quantized:
            return self._quantized.dense(name, *shape, window=window)
        if name not in self._where:
            raise ModelError(f"{self.path}: tensor {name!r} is missing")
        found = self._map(name).entry(name)
        self._check(name, found.shape, shape, found.dtype)
        tensor = self._map(name).tensor(name)
        return tensor if window is None else tensor[span(window.outputs), span(window.inputs)]

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name` in its file, of a quantized weight that of what it means. Raises
        ModelError if it is missing."""
        if self._quantized is not None and name in self._quantized:
            return self._quantized.shape(name)
        if name not in self._where:
            raise ModelError(f"{self.path}: tensor {name!r} is missing")
        return self._map(name).entry(name).shape

    def forget(self, name: str) -> None:
        """Give back the memory that a mapped tensor's pages take; they are read again if needed."""
        parts = [name]
        if self._quantized is not None and name in self._quantized:
            parts = self._quantized.parts(name)
        for part in parts:
            self._map(part).forget(part)

    def _view(self, name: str) -> Tensor:
        """A tensor of any kind, where it lies in the file if that can be."""
        entry = self._map(name).entry(name)
        if entry.dtype is None or 0 in entry.shape:
            return self._read(name)
        return self._map(name).tensor(name)

    def _dtype(self, name: str) -> torch.dtype | None:
        return self._map(name).entry(name).dtype

    def _map(self, name: str) -> MappedFile:
        file = self._where[name]
        if file not in self._maps:
            self._maps[file] = MappedFile(file)
        return self._maps[file]

    def _check(
        self, name: str, found: tuple[int, ...], shape: tuple[int, ...], dtype: torch.dtype | None
    ) -> None:
        if found != shape:
            raise ModelError(
                f"{self.path}: tensor {name!r} has shape {found}, "
                f"the configuration asks for {shape}"
            )
        if dtype not in _FLOATS:
            raise ModelError(f"{self.path}: tensor {name!r} holds {dtype}")

    def _read(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._readers[self._where[name]].get_tensor(name)
        except SafetensorError as error:
            raise ModelError(f"{self.path}: tensor {name!r}: {error}") from error
        return tensor


def fingerprint(path: Path, quantization: str = "none") -> str:
    """32 hex digits that change with the configuration or the weights of a model directory, and
    with what is made of the weights at load.

    Fast for any size: hashes config.json (which says how weights are quantized), and of each
    weight file its size, its header (names, shapes, dtypes) and evenly spaced samples of its bytes.
    """
    digest = xxhash.xxh3_128((path / "config.json").read_bytes())
    for file in _files(path):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            digest.update(stream.read(min(header, size)))
            for sample in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    for name in OTHER_FILES:
        if (path / name).is_file():
            digest.update((path / name).read_bytes())
    if quantization != "none":
        digest.update(quantization.encode())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """The weight files of a directory, as its index lists them; else the one with the usual
    name; else all that there are."""
    index = path / _INDEX
    if not index.is_file():
        usual = path / "model.safetensors"
        return [usual] if usual.is_file() else sorted(path.glob("*.safetensors"))
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: damaged: {error!r}") from error
    files = [path / name for name in sorted(names)]
    for file in files:
        if file.parent != path or not file.is_file():
            raise ModelError(f"{index}: names {file.name!r}, which is not there")
    return files
