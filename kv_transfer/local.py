"""How a process lets others of its host and user into its memory: over a unix socket.

The socket's name is abstract. Whoever shows a one-use token, and is the same user by the kernel's
word, gets the greeting, and descriptors with it if there are any. The socket then stays open and
silent: its end tells the consumer that the producer is gone. Nothing has a name in a file system,
so nothing is left behind by SIGKILL. Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from baton.errors import KvTransferError
from kv_transfer.server import DataServer
from kv_transfer.sockets import receive_exactly
from kv_transfer.transport import TOKEN_BYTES

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_HANDSHAKE_SECONDS = 5.0


def host_id() -> str:
    """Equal for two processes that can share memory this way: same boot, network namespace (the
    abstract socket's scope), user namespace and user."""
    spaces = [str(Path(f"/proc/self/ns/{name}").stat().st_ino) for name in ("net", "user")]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.sha256(":".join([boot, *spaces, str(os.getuid())]).encode()).hexdigest()[:32]


class LocalServer(DataServer):
    """Greets peers of the same user that hold a token."""

    def __init__(self, address: str, greeting: bytes, descriptors: Sequence[int] = ()) -> None:
        super().__init__(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        self.address = address
        self._greeting = greeting
        self._descriptors = descriptors

    def start(self) -> None:
        """Listen."""
        self._listener.bind(b"\0" + self.address.encode())
        super().start()

    async def _serve(self, peer: socket.socket) -> None:
        """Greet, then hold the connection until the peer goes."""
        loop = asyncio.get_running_loop()
        with peer:
            peer.setblocking(False)
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_HANDSHAKE_SECONDS):
                    token = await receive_exactly(peer, TOKEN_BYTES)
                if peer_uid(peer) != os.getuid():
                    return
                if not self._admits(token):
                    return
                socket.send_fds(peer, [self._greeting], self._descriptors)
                await loop.sock_recv(peer, 1)


def peer_uid(peer: socket.socket) -> int:
    """The user at the other end of a unix socket, as the kernel knows it."""
    raw = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return int(uid)


@contextlib.contextmanager
def link_to(what: str) -> Iterator[socket.socket]:
    """A socket to open `what` with, which stays open unless that fails: then KvTransferError, which
    says nothing about the producer's health."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        yield link
    except (OSError, ValueError, struct.error) as error:
        link.close()
        raise KvTransferError(f"{what}: {error or type(error).__name__}") from error
    except BaseException:
        link.close()
        raise


async def greeted(
    link: socket.socket, address: str, token: bytes, size: int, descriptors: int = 0
) -> tuple[bytes, list[int]]:
    """Connect `link` to the server at `address`: its greeting, of at most `size` bytes, and as many
    descriptors at most, which are the caller's to close. Raises OSError, TimeoutError."""
    loop = asyncio.get_running_loop()
    link.setblocking(False)
    async with asyncio.timeout(_HANDSHAKE_SECONDS):
        await loop.sock_connect(link, b"\0" + address.encode())
        await loop.sock_sendall(link, token)
        await _readable(link)
    greeting, received, _, _ = socket.recv_fds(link, size, descriptors)
    return greeting, received


async def _readable(sock: socket.socket) -> None:
    """Wait until there is something to receive: asyncio itself cannot receive descriptors."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(sock)
