"""Connections of consumers to a producer's data, each a task of its own."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Coroutine

from kv_transfer.transport import Tokens

MAX_CONNECTIONS = 256


class DataServer:
    """Listens on a socket that is bound by the time of `start`. Subclasses say what a connection
    is for, and let only peers in that hold a one-use token."""

    def __init__(self, listener: socket.socket) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._tokens = Tokens()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Listen."""
        self._listener.listen(128)
        self._spawn(self._accept())

    def issue_token(self) -> bytes:
        """A token for one connection."""
        return self._tokens.issue(time.monotonic())

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()

    async def _serve(self, peer: socket.socket) -> None:
        """One connection, to its end. Closes it."""
        raise NotImplementedError

    def _admits(self, token: bytes) -> bool:
        """True once for each token."""
        return self._tokens.redeem(token, time.monotonic())

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            peer, _ = await loop.sock_accept(self._listener)
            if len(self._tasks) > MAX_CONNECTIONS:
                peer.close()
                continue
            self._spawn(self._serve(peer))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
