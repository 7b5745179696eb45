"""Wakes a thread that waits for something to read."""

from __future__ import annotations

import contextlib
import socket


class Bell:
    """One thread waits for it as for a connection (`fileno`), any other may ring."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        for end in (self._ours, self._theirs):
            end.setblocking(False)

    def fileno(self) -> int:
        """There is something to read when it has rung."""
        return self._ours.fileno()

    def ring(self) -> None:
        """Wake who waits, or who waits next. Never blocks; in vain when it is closed."""
        with contextlib.suppress(OSError):  # so many have rung that one more is not missed
            self._theirs.send(b"!")

    def silence(self) -> None:
        """It has been heard."""
        with contextlib.suppress(BlockingIOError):
            while self._ours.recv(4096):
                pass

    def close(self) -> None:
        """Nobody waits any more. Idempotent."""
        self._ours.close()
        self._theirs.close()
