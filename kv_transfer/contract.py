"""What the workers see of the hand-off: a Producer beside prefill, a Consumer beside decode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.types import KvRef


@dataclass(frozen=True, slots=True)
class KvLayout:
    """What the bytes of a block mean. Two engines exchange KV only if all of it is equal.

    A block holds `block_size` tokens over all layers: [layers, 2 (keys, values)] planes of
    [block_size, kv_heads, head_dim] of `dtype`, contiguous. In int8 each plane is followed by
    [block_size, kv_heads] scales.
    """

    model_fingerprint: str
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    block_size: int
    item_size: int  # bytes per number
    scale_size: int = 0  # bytes of the scale that the numbers of one token and head share

    VERSION = 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        head = self.head_dim * self.item_size + self.scale_size
        return self.layers * 2 * self.block_size * self.kv_heads * head

    @property
    def digest(self) -> str:
        """Hex digest that both sides compare before any byte moves."""
        parts = (
            self.VERSION,
            self.model_fingerprint,
            self.layers,
            self.kv_heads,
            self.head_dim,
            self.dtype,
            self.block_size,
            self.item_size,
            self.scale_size,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


class BlockStore(Protocol):
    """The KV pool as the hand-off sees it: numbered blocks of bytes in host memory."""

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        ...

    def block(self, index: int) -> memoryview:
        """Writable bytes of one block, over all layers; contiguous."""
        ...


@dataclass(frozen=True, slots=True)
class PullReport:
    """A finished pull: `seconds` from the call to the accepted release."""

    transport: str
    bytes: int
    seconds: float

    @property
    def on_device(self) -> bool:
        """Whether the blocks went straight into the consumer's device pool (device.py), and not
        into its BlockStore."""
        return self.transport == "cuda_ipc"


OnFreed = Callable[[bytes], None]
"""Called once per lease id, on the event loop, when its blocks may be reused: the lease ended
(released, expired or revoked) and nobody reads it any more."""


class Producer(Protocol):
    """Publishes blocks under leases. All methods are called on the event loop and do not block.

    Lease: FILLING -> SEALED -> RELEASED | EXPIRED | REVOKED (from any live state). Leases expire
    on a timer of their own, whether or not anything is scheduled.
    """

    def publish(self, blocks: Sequence[int], tokens: int) -> KvRef:
        """Grant a lease over `blocks` (in order of position), none of them final yet. The
        blocks must not be reused before OnFreed names the lease.

        Raises Overloaded when the cap on leased bytes is reached.
        """
        ...

    def advance(self, lease_id: bytes, ready: int) -> None:
        """The first `ready` blocks of the lease are final: digest them and tell followers.
        Ignored once the lease has ended."""
        ...

    def seal(self, lease_id: bytes) -> None:
        """Every block is final. Ignored once the lease has ended."""
        ...

    def revoke(self, lease_id: bytes) -> None:
        """End the lease: prefill was cancelled or failed. Idempotent."""
        ...


class Consumer(Protocol):
    """Pulls leased blocks into pages that the caller has reserved."""

    async def pull(self, ref: KvRef, into: Sequence[int], skip: int = 0) -> PullReport:
        """Copy the blocks of `ref`, but the first `skip`, which the caller has, into the local
        blocks `into`, chunk by chunk as they become final, verify them, and have the producer
        confirm that the lease was still live.

        Returns only when the KV is valid. Raises KvTransferError when it cannot be had (bad
        layout, digest mismatch, lease gone, peer dead or too slow); the caller recomputes. In
        every case, cancellation included, nothing writes into `into` any more once this ends.
        """
        ...
