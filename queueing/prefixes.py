"""The prefix map: what the gateways of a pool know of the prefix caches of its workers.

Keys of blocks, which are salted hashes (baton/prefix.py), by worker. It is written and read in
one call a few times a second, far from any request, and is no more than a help: what is refused or
lost costs hits and nothing else.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.errors import QueueError
from queueing.scripts import Clock, Scripts

MAX_SHARED_KEYS = 1 << 17
"""Of all workers together: about 15 MB of the server's memory."""

MAX_READ_KEYS = 1 << 14
"""That one call returns: the newest."""

KEEP_SECONDS = 600.0
"""How long a key stays that nobody tells again."""


@dataclass(frozen=True, slots=True)
class WorkerKeys:
    """Keys of one worker in one epoch of it, the least recently used first."""

    worker: str
    epoch: int
    keys: tuple[bytes, ...]


class PrefixExchange:
    """One gateway's side. It remembers up to when it has read."""

    def __init__(
        self,
        url: str,
        pool: str,
        *,
        most: int = MAX_SHARED_KEYS,
        most_read: int = MAX_READ_KEYS,
        clock: Clock | None = None,
    ) -> None:
        """Does not connect yet. Raises ConfigError."""
        self._scripts = Scripts(url, pool, clock)
        self._limits = (round(KEEP_SECONDS * 1e6), most, most_read)
        self._read_up_to = "0"

    async def exchange(self, news: Mapping[tuple[str, int], Sequence[bytes]]) -> list[WorkerKeys]:
        """Tell keys by worker and epoch, the most recently used first; return what was told until
        now and not heard yet, by this gateway, too; seldom something twice. Keys of an epoch that
        has passed are not kept; nor are any while the server is out of memory.

        Raises QueueError when the server cannot be reached in time.
        """
        told: list[str | int] = []
        for (worker, epoch), keys in news.items():
            told += [worker, epoch, len(keys), *map(_spell, keys)]
        self._read_up_to, *rows = await self._scripts.run(
            "prefixes", self._read_up_to, *self._limits, *told
        )
        return [
            WorkerKeys(worker, int(epoch), tuple(map(_read, reversed(keys))))
            for worker, epoch, keys in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
        ]

    async def close(self) -> None:
        """Close the connections."""
        await self._scripts.close()


def _spell(key: bytes) -> str:
    return base64.b64encode(key).decode().rstrip("=")


def _read(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as error:
        raise QueueError("the prefix map is damaged") from error
