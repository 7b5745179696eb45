"""Hand-off between hosts: scatter/gather between the two pools over a TCP connection of its own.

A connection starts with a one-use token from the control channel. Then the consumer asks for runs
of final blocks of a lease by position, one at a time, and the bytes come behind a fixed header.
Block numbers and addresses never travel: the producer looks its own up. Sockets are non-blocking;
threads move the bytes and poll with deadlines, so a frozen peer costs bounded time.

Not encrypted: for private networks. The producer binds exactly the host that it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Protocol

from baton.errors import KvTransferError
from kv_transfer.contract import BlockStore
from kv_transfer.digest import DigestKind
from kv_transfer.lease import LEASE_ID_BYTES
from kv_transfer.server import MAX_CONNECTIONS, DataServer
from kv_transfer.sockets import (
    abort,
    prepare,
    readable,
    receive_all,
    receive_exactly,
    send_all,
    shut,
)
from kv_transfer.store import block_array
from kv_transfer.transport import TOKEN_BYTES, DataEndpoint, PeerLost, Run, quiet

_HELLO = struct.Struct(f"!4s{TOKEN_BYTES}s")  # magic, token
_REQUEST = struct.Struct(f"!4sII{LEASE_ID_BYTES}s")  # magic, first, count, lease
_REPLY = struct.Struct(f"!4sIIIQ{LEASE_ID_BYTES}s")  # magic, status, first, count, bytes, lease
_MAGIC = b"BKT1"
_OK, _GONE = 0, 1

MAX_RUN_BYTES = 64 * 2**20
"""A request for more than this (and more than one block) is refused."""
_HANDSHAKE_SECONDS = 5.0


class BlockSource(Protocol):
    """The leases, as the server sees them. Called on the event loop."""

    def begin_read(self, lease_id: bytes, first: int, count: int) -> Sequence[int]:
        """The block numbers of final positions, counted as being read. Raises KvTransferError."""
        ...

    def end_read(self, lease_id: bytes) -> None:
        """They are read no more."""
        ...


class TcpServer(DataServer):
    """Sends leased blocks to consumers that hold a token.

    Listens on `address` (host:port, port 0 for any); `advertised_host` is what consumers are told,
    if not the same. `stall` is the longest time in seconds that a send may make no progress.
    """

    def __init__(
        self,
        source: BlockSource,
        store: BlockStore,
        address: str,
        *,
        stall: float,
        advertised_host: str = "",
    ) -> None:
        self._source = source
        self._store = store
        self._stall = stall
        self._sending: dict[bytes, set[socket.socket]] = {}
        self._threads = ThreadPoolExecutor(MAX_CONNECTIONS, "kv-send")
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__(socket.socket(family, socket.SOCK_STREAM))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((host.strip("[]"), int(port)))
        self.address = f"{advertised_host or host}:{self._listener.getsockname()[1]}"

    def stop_sending(self, lease_id: bytes) -> None:
        """Break off sends of a lease that was taken back, so that its blocks become free."""
        for peer in self._sending.get(lease_id, ()):
            shut(peer)

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        await super().close()
        self._threads.shutdown()

    async def _serve(self, peer: socket.socket) -> None:
        """One connection: hello, then requests until it ends or talks nonsense."""
        with peer, contextlib.suppress(OSError, TimeoutError):
            prepare(peer, self._stall)
            magic, token = _HELLO.unpack(await _receive(peer, _HELLO.size, _HANDSHAKE_SECONDS))
            if magic != _MAGIC or not self._admits(token):
                return
            while True:
                request = await _receive(peer, 1, None)
                request += await _receive(peer, _REQUEST.size - 1, _HANDSHAKE_SECONDS)
                magic, first, count, lease_id = _REQUEST.unpack(request)
                if magic != _MAGIC or not 0 < count <= self._most_blocks():
                    return
                await self._answer(peer, lease_id, first, count)

    def _most_blocks(self) -> int:
        return max(1, MAX_RUN_BYTES // self._store.block_bytes)

    async def _answer(self, peer: socket.socket, lease_id: bytes, first: int, count: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            blocks = self._source.begin_read(lease_id, first, count)
        except KvTransferError:
            await loop.sock_sendall(peer, _REPLY.pack(_MAGIC, _GONE, first, 0, 0, lease_id))
            return
        sending = self._sending.setdefault(lease_id, set())
        sending.add(peer)
        try:
            size = count * self._store.block_bytes
            header = _REPLY.pack(_MAGIC, _OK, first, count, size, lease_id)
            views = [memoryview(header), *(block_array(self._store, i).data for i in blocks)]
            work = loop.run_in_executor(self._threads, send_all, peer, views, self._stall)
            await quiet(work, lambda: shut(peer))
        finally:
            sending.discard(peer)
            if not sending:
                self._sending.pop(lease_id, None)
            self._source.end_read(lease_id)


class TcpReader:
    """Receives blocks over a few connections to one producer, each used for one run at a time.

    `endpoint` asks the control channel for the address and a fresh token.
    """

    transport = "tcp"
    digest_kind = DigestKind.XXH3

    def __init__(
        self,
        endpoint: Callable[[], Awaitable[DataEndpoint]],
        *,
        block_bytes: int,
        stall: float,
        threads: Executor,
        connections: int = 4,
    ) -> None:
        self._endpoint = endpoint
        self._block_bytes = block_bytes
        self._stall = stall
        self._threads = threads
        self._places = asyncio.Semaphore(connections)
        self._idle: list[socket.socket] = []
        self._busy: set[socket.socket] = set()
        self._closed = False

    async def read(self, run: Run) -> None:
        """Fill and land every target. Raises PeerLost when the connection breaks or stalls."""
        async with self._places:
            if self._closed:
                raise PeerLost("data channel is closed")
            sock = self._take_idle() or await self._connect()
            self._busy.add(sock)
            try:
                await self._transfer(sock, run)
            except BaseException:
                abort(sock)  # whatever is still under way must not meet the next run
                raise
            finally:
                self._busy.discard(sock)
            self._idle.append(sock)

    async def close(self) -> None:
        """Close every connection; reads in progress fail."""
        self._closed = True
        for sock in self._busy:
            shut(sock)
        while self._idle:
            self._idle.pop().close()

    def _take_idle(self) -> socket.socket | None:
        """A connection that still stands: the producer says nothing on one that is idle."""
        while self._idle:
            sock = self._idle.pop()
            if not readable(sock):
                return sock
            sock.close()
        return None

    async def _connect(self) -> socket.socket:
        endpoint = await self._endpoint()
        loop = asyncio.get_running_loop()
        host, _, port = endpoint.address.rpartition(":")
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(self._stall):
                found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
                family, kind, protocol, _, address = found[0]
                sock = socket.socket(family, kind, protocol)
                prepare(sock, self._stall)
                await loop.sock_connect(sock, address)
                await loop.sock_sendall(sock, _HELLO.pack(_MAGIC, endpoint.token))
        except (OSError, ValueError) as error:
            if sock is not None:
                sock.close()
            raise PeerLost(f"data channel: {error or type(error).__name__}") from error
        except BaseException:
            if sock is not None:
                sock.close()
            raise
        return sock

    async def _transfer(self, sock: socket.socket, run: Run) -> None:
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._receive_run, sock, run)

        def stop() -> None:
            run.stop()
            shut(sock)

        try:
            await quiet(work, stop)
        except OSError as error:
            raise PeerLost(f"data channel: {error or type(error).__name__}") from error

    def _receive_run(self, sock: socket.socket, run: Run) -> None:
        """In a thread: ask for the run and scatter it into its targets."""
        count, size = len(run.targets), self._block_bytes
        request = _REQUEST.pack(_MAGIC, run.first, count, run.lease_id)
        send_all(sock, [memoryview(request)], self._stall)
        header = bytearray(_REPLY.size)
        receive_all(sock, [memoryview(header)], self._stall)
        magic, status, first, sent, length, lease_id = _REPLY.unpack(header)
        if magic != _MAGIC or (first, lease_id) != (run.first, run.lease_id):
            raise PeerLost("data channel: a reply to something else")
        if status != _OK:
            raise KvTransferError("lease is gone")
        if (sent, length) != (count, count * size):
            raise PeerLost("data channel: a reply of the wrong length")
        views = [target.data for target in run.targets]
        receive_all(sock, views, self._stall, run.land)


async def _receive(sock: socket.socket, size: int, seconds: float | None) -> bytes:
    async with asyncio.timeout(seconds):
        return await receive_exactly(sock, size)
