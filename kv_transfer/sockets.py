"""Non-blocking sockets: scatter/gather with deadlines for threads, exact reads for the loop."""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
from collections.abc import Callable, Sequence

_LINGER = struct.Struct("ii")  # on, seconds
_VIEWS_PER_CALL = 64  # buffers in one sendmsg or recvmsg_into; the kernel takes 1024


def prepare(sock: socket.socket, stall: float) -> None:
    """Non-blocking, no delay, and unacknowledged or silent peers are given up by the kernel."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stall * 1000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(stall)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(stall / 3)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def shut(sock: socket.socket) -> None:
    """Break a connection under the thread that uses it: its calls return at once."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def abort(sock: socket.socket) -> None:
    """Close with a reset, so that a sender at the other end stops at once."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER.pack(1, 0))
    sock.close()


def readable(sock: socket.socket) -> bool:
    """Whether there is something to receive at this moment, be it the end."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def send_all(sock: socket.socket, views: Sequence[memoryview], stall: float) -> None:
    """Gather and send. Raises OSError, TimeoutError after `stall` seconds without progress."""
    done, at = 0, 0  # views sent whole; bytes sent of the next one
    while done < len(views):
        batch = [views[done][at:], *views[done + 1 : done + _VIEWS_PER_CALL]]
        try:
            moved = sock.sendmsg(batch)
        except BlockingIOError:
            _wait(sock, select.POLLOUT, stall)
            continue
        done, at = _advance(views, done, at, moved)


def receive_all(
    sock: socket.socket,
    views: Sequence[memoryview],
    stall: float,
    landed: Callable[[int], None] = lambda index: None,
) -> None:
    """Receive and scatter, naming each view to `landed` when it is whole. Raises OSError,
    TimeoutError after `stall` seconds without progress."""
    done, at = 0, 0
    while done < len(views):
        batch = [views[done][at:], *views[done + 1 : done + _VIEWS_PER_CALL]]
        try:
            moved, _, _, _ = sock.recvmsg_into(batch)
        except BlockingIOError:
            _wait(sock, select.POLLIN, stall)
            continue
        if not moved:
            raise ConnectionError("connection ended")
        before = done
        done, at = _advance(views, done, at, moved)
        for index in range(before, done):
            landed(index)


def _advance(views: Sequence[memoryview], done: int, at: int, moved: int) -> tuple[int, int]:
    """The place in `views` after `moved` more bytes."""
    at += moved
    while done < len(views) and at >= views[done].nbytes:
        at -= views[done].nbytes
        done += 1
    return done, at


def _wait(sock: socket.socket, event: int, stall: float) -> None:
    """Wait for POLLIN or POLLOUT. A peer that has closed its side takes nothing any more; with its
    window shut, the kernel would go on asking it for ever."""
    poll = select.poll()
    poll.register(sock, event | select.POLLRDHUP if event == select.POLLOUT else event)
    ready = poll.poll(stall * 1000)
    if not ready:
        raise TimeoutError(f"no progress in {stall:g} s")
    if event == select.POLLOUT and ready[0][1] & select.POLLRDHUP:
        raise ConnectionError("connection ended")


async def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """`size` bytes from a non-blocking socket; raises ConnectionError at its end."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        part = await loop.sock_recv(sock, size - len(data))
        if not part:
            raise ConnectionError("connection ended")
        data += part
    return data
