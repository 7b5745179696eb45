"""What the gateways of a pool have learnt about output lengths: one versioned value on the server.

The queue does not know what is in it: bytes that one gateway wrote and all may read. Weights of
salted, colliding hashes are no prompts (docs/decisions/005-length-prediction.md).
"""

from __future__ import annotations

import base64
import binascii
import secrets
from dataclasses import dataclass

from baton.errors import QueueError
from queueing.scripts import Scripts

KEEP_SECONDS = 7 * 24 * 3600
"""How long a value stays that nobody writes any more: its shape is out of use."""


@dataclass(frozen=True, slots=True)
class SharedLengths:
    """`version` 0: nothing is there. `data` is None if the reader knew this version."""

    version: int
    data: bytes | None


class LengthsExchange:
    """Reads and writes the value of one `shape`, a name for what makes values comparable.

    Every method raises QueueError when the server cannot be reached in time, and Overloaded when
    it has no memory left.
    """

    def __init__(self, url: str, pool: str, shape: str) -> None:
        """Does not connect yet. Raises ConfigError."""
        self._scripts = Scripts(url, pool)
        self._shape = shape

    async def read(self, known: int) -> SharedLengths:
        """The value, unless its version is `known`."""
        version, *data = await self._scripts.run("lengths_read", self._shape, known)
        try:
            return SharedLengths(version, base64.b64decode(data[0]) if data else None)
        except binascii.Error as error:
            raise QueueError("the shared lengths are damaged") from error

    async def write(self, expected: int, data: bytes) -> int | None:
        """Replace version `expected` and return the new version; None if it is not the current
        one any more."""
        nonce = secrets.token_hex(8)
        text = base64.b64encode(data).decode()
        ttl = KEEP_SECONDS * 1000
        done, version = await self._scripts.run(
            "lengths_write", self._shape, nonce, expected, ttl, text
        )
        return version if done else None

    async def close(self) -> None:
        """Close the connections."""
        await self._scripts.close()
