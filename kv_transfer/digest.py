"""Digests that tell a right block from a damaged, stale or misplaced one.

Error detection, not authentication: whoever can forge blocks can forge digests. The peer is
authenticated by the control channel.
"""

from __future__ import annotations

from enum import Enum

import xxhash


class DigestKind(Enum):
    """What digests are taken of, and how: two kinds are never compared."""

    XXH3 = 1  # `block_digest` of bytes in host memory
    DEVICE = 2  # of bytes on a device; see device.SourcePool.digests


def block_digest(block: memoryview, position: int) -> int:
    """xxh3-64 of a block's bytes, seeded with its index within the lease, so that two blocks
    swapped on the way do not pass for each other whatever their numbers in either pool."""
    return int(xxhash.xxh3_64_intdigest(block, seed=position))
