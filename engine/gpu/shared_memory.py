"""A device's memory, as other processes of the host see it: by handles, which are bytes.

On a GPU these are CUDA's IPC handles, through the driver's own library: torch has the calls only
inside its sharing of tensors, which wants to count references and to record events between
processes. An allocation has a handle if cudaMalloc made it; torch's does, unless
PYTORCH_CUDA_ALLOC_CONF says expandable_segments. The handle is that of the whole allocation, and
gives read and write access to all of it: the protection is that only workers of one user get it.

For tests on a CPU the same is done with a memfd.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

_HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1


@dataclass(frozen=True, slots=True)
class Opened:
    """Memory of another process: [bytes] uint8. Not to be touched any more after `close`."""

    memory: Tensor
    close: Callable[[], None]


class SharedMemory(Protocol):
    """What a device's memory must be able to do."""

    def export(self, tensor: Tensor) -> bytes:
        """A handle of the memory of `tensor`, contiguous; good while that memory is there. Raises
        OSError if it cannot be shared."""
        ...

    def open(self, handle: bytes, size: int) -> Opened:
        """The first `size` bytes of another process's memory. Raises OSError if they cannot be had
        from here, ValueError for what is no handle of so much memory."""
        ...


class CudaMemory:
    """Memory of one GPU. Opens that of any GPU that it can read: itself, or one beside it that this
    process sees, too."""

    _FORMAT = struct.Struct(f"!64s{_HANDLE_BYTES}sQQ")  # device's UUID, handle, offset, bytes

    def __init__(self, device: torch.device) -> None:
        """`device` with its index. Raises OSError where there is no NVIDIA driver."""
        self._device = device
        self._driver = _Driver(self._device)

    def export(self, tensor: Tensor) -> bytes:
        """See SharedMemory."""
        address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        base, handle = self._driver.handle_of(address)
        uuid = _uuid(self._device.index).encode()
        return self._FORMAT.pack(uuid, handle, address - base, size)

    def open(self, handle: bytes, size: int) -> Opened:
        """See SharedMemory. For torch it is memory of this device, whose kernels read it: nothing
        is to be computed on the other one."""
        try:
            uuid, raw, offset, there = self._FORMAT.unpack(handle)
        except struct.error as error:
            raise ValueError(str(error)) from error
        if there < size:
            raise ValueError(f"{there} bytes of memory where {size} were announced")
        self._require(uuid.rstrip(b"\0").decode())
        base = self._driver.open(raw)
        try:
            memory = torch.as_tensor(_View(base + offset, size), device=self._device)
            if memory.data_ptr() != base + offset:
                raise OSError("torch cannot see another GPU's memory as it is")
        except BaseException:
            self._driver.close(base)
            raise
        return Opened(memory, lambda: self._driver.close(base))

    def _require(self, uuid: str) -> None:
        """Raise OSError unless the GPU with this UUID is one whose memory this one can read."""
        own = self._device.index
        for index in range(torch.cuda.device_count()):
            if _uuid(index) == uuid:
                if index != own and not torch.cuda.can_device_access_peer(own, index):
                    raise OSError(f"GPU {own} has no access to the memory of GPU {index}")
                return
        raise OSError(f"GPU {uuid} is not visible to this process")


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)


class _View:
    """Memory as torch takes it from other libraries."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class _Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class _Driver:
    """The calls of the CUDA driver that are needed, in the context that torch uses."""

    def __init__(self, device: torch.device) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        torch.cuda.init()  # type: ignore[no-untyped-call]
        number, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(number), ctypes.c_int(device.index))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        self._context = context

    def handle_of(self, address: int) -> tuple[int, bytes]:
        """Where the allocation begins that `address` is in, and its handle."""
        base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
        at = ctypes.c_uint64(address)
        with self._current():
            self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), at)
            self._call("cuIpcGetMemHandle", ctypes.byref(handle), base)
        return base.value, bytes(handle)

    def open(self, handle: bytes) -> int:
        """Where the allocation of another process is to be found here."""
        base, flags = ctypes.c_uint64(), ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
        with self._current():
            taken = _Handle.from_buffer_copy(handle)
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(base), taken, flags)
        return base.value

    def close(self, base: int) -> None:
        """It is not used here any more."""
        with self._current():
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(base))

    @contextmanager
    def _current(self) -> Iterator[None]:
        """On this thread, whatever it had before."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise OSError(f"{name}: {(text.value or b'error').decode()} ({status})")


class HostMemory:
    """Memory of the host that lies in a memfd, for tests: a device that every process reads."""

    def export(self, tensor: Tensor) -> bytes:
        """See SharedMemory."""
        address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        offset, file_id = _mapping(address)
        for file in Path("/proc/self/fd").iterdir():
            try:
                found = file.stat()
            except OSError:  # closed meanwhile
                continue
            if (found.st_dev, found.st_ino) == file_id:
                return f"{os.getpid()} {file.name} {offset} {size}".encode()
        raise OSError("memory that no descriptor stands for")

    def open(self, handle: bytes, size: int) -> Opened:
        """See SharedMemory. What is written here is not seen there."""
        process, descriptor, offset, there = map(int, handle.split())
        if there < size:
            raise ValueError(f"{there} bytes of memory where {size} were announced")
        fd = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDONLY)
        try:
            mapped = mmap.mmap(fd, offset + size, access=mmap.ACCESS_COPY)
        finally:
            os.close(fd)
        memory = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=offset)
        return Opened(memory, lambda: None)


def memory_of(device: torch.device) -> SharedMemory:
    """That of `device`. Raises OSError if there is no way to share it."""
    return CudaMemory(device) if device.type == "cuda" else HostMemory()


def _mapping(address: int) -> tuple[int, tuple[int, int]]:
    """Of the file that is mapped at `address`: the offset there, and its device and inode."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        extent, _, offset, device, inode, *_ = line.split()
        first, last = (int(part, 16) for part in extent.split("-"))
        if first <= address < last and int(inode):
            major, minor = (int(part, 16) for part in device.split(":"))
            return int(offset, 16) + address - first, (os.makedev(major, minor), int(inode))
    raise OSError("memory of no file")
