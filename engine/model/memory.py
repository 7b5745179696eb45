"""Memory that several processes see: that of a KV pool which others read, or compute in, too."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from typing import Protocol


class Memory(Protocol):
    """Zeroed memory that other processes can map by its descriptor."""

    @property
    def buffer(self) -> memoryview:
        """All of it, writable."""
        ...

    @property
    def fd(self) -> int:
        """What it is mapped by; the owner's to close."""
        ...


class OwnMemory:
    """Memory of one worker's processes. The descriptor closes with this object; the memory itself
    goes with the last view of it."""

    def __init__(self, size: int) -> None:
        if hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("baton-kv")
        else:  # a file without a name
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, size)
        self.buffer = map_memory(self.fd, size)


def map_memory(fd: int, size: int) -> memoryview:
    """Memory that another process has, writable."""
    return memoryview(mmap.mmap(fd, size))
