"""A safetensors file mapped into memory: its tensors are read where they lie.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON
header, the header with each tensor's dtype, shape and byte range, then the bytes.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """What the header says of one tensor. `start` counts from the beginning of the file."""

    dtype: torch.dtype | None  # None for those that torch has under no name
    shape: tuple[int, ...]
    start: int
    end: int


class MappedFile:
    """One file, which safetensors itself has found to be sound.

    Whoever truncates the file while a tensor of it is in use ends the process.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            # Copy on write, never written: torch wants writable memory and warns of other.
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        length = int.from_bytes(self._map[:8], "little")
        header = json.loads(self._map[8 : 8 + length])
        header.pop("__metadata__", None)
        self._entries = {
            name: Entry(
                _DTYPES.get(found["dtype"]),
                tuple(found["shape"]),
                *(8 + length + offset for offset in found["data_offsets"]),
            )
            for name, found in header.items()
        }

    def entry(self, name: str) -> Entry:
        """What is stored under a name that the file has."""
        return self._entries[name]

    def tensor(self, name: str) -> Tensor:
        """A view of the file that keeps it mapped; a copy where the file has it misaligned.

        The tensor must hold something, of a dtype that is known.
        """
        entry = self._entries[name]
        assert entry.dtype is not None
        count, start = math.prod(entry.shape), entry.start
        if start % entry.dtype.itemsize:
            aligned = bytearray(self._map[start : entry.end])
            return torch.frombuffer(aligned, dtype=entry.dtype).view(entry.shape)
        flat = torch.frombuffer(self._map, dtype=entry.dtype, count=count, offset=start)
        return flat.view(entry.shape)

    def forget(self, name: str) -> None:
        """Let the kernel take the memory of a tensor's pages; they are read again if needed."""
        entry = self._entries[name]
        start = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = entry.end // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)
