"""What every transport shares: the run of blocks it moves, how a thread's work is ended, tokens.

A transport moves bytes. It knows neither leases nor digests: `Run.land` checks what arrived.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from baton.errors import KvTransferError
from kv_transfer.digest import DigestKind, block_digest
from kv_transfer.store import Bytes

T = TypeVar("T")

TOKEN_BYTES = 32
INLINE_BYTES = 256 * 2**10
"""Work on fewer bytes than this is done on the event loop: copying and hashing 256 KiB took 13
microseconds where handing it to a thread and back took 31."""


class PeerLost(KvTransferError):
    """The peer is dead, frozen or restarted, or its channel broke: connect anew next time."""


@dataclass(frozen=True, slots=True)
class DataEndpoint:
    """Where a producer's bytes can be had: "cuda_ipc", "shm" or "tcp", its address, a one-use
    token."""

    transport: str
    address: str
    token: bytes


class Run:
    """Consecutive final blocks of a lease on their way into local blocks.

    `first` is the position in the lease of the first one, `sources` the producer's block numbers,
    `targets` the local blocks in host memory and `digests` what each must hash to. A transport
    fills the targets in order, calls `land` after each, and gives up as soon as `stopped` is set.
    One that copies to a device takes their numbers, `into`, in the place of the targets.
    """

    __slots__ = ("digests", "first", "into", "landed", "lease_id", "sources", "stopped", "targets")

    def __init__(
        self,
        lease_id: bytes,
        first: int,
        sources: Sequence[int],
        targets: Sequence[Bytes],
        digests: Sequence[int],
        into: Sequence[int] = (),
    ) -> None:
        if not len(sources) == len(targets) == len(digests):
            raise ValueError("a run needs a target and a digest for every source")
        self.lease_id = lease_id
        self.first = first
        self.sources = sources
        self.targets = targets
        self.digests = digests
        self.into = into
        self.landed = 0
        self.stopped = False

    @property
    def bytes(self) -> int:
        """Bytes to move."""
        return sum(target.nbytes for target in self.targets)

    def stop(self) -> None:
        """Ask the thread that fills the targets to give up before its next block."""
        self.stopped = True

    def land(self, index: int) -> None:
        """Block `index` of the run has been written whole; raises KvTransferError if it is not
        what the producer published, or if the run was stopped."""
        self.check_wanted()
        self._check(index, block_digest(self.targets[index].data, self.first + index))
        self.landed += 1

    def arrive(self, digests: Sequence[int]) -> None:
        """Every block of the run is where it was to go, and these are the digests of what came;
        raises as `land`."""
        self.check_wanted()
        for index, digest in enumerate(digests):
            self._check(index, digest)
        self.landed = len(digests)

    def check_wanted(self) -> None:
        """Raise KvTransferError if the run was stopped."""
        if self.stopped:
            raise KvTransferError("transfer was given up")

    def _check(self, index: int, digest: int) -> None:
        if digest != self.digests[index]:
            raise KvTransferError(f"digest mismatch in block {self.first + index} of the lease")


class Reader(Protocol):
    """The consumer's data channel to one producer."""

    @property
    def transport(self) -> str:
        """Its name, for reports."""
        ...

    @property
    def digest_kind(self) -> DigestKind:
        """The digests that it verifies by."""
        ...

    async def read(self, run: Run) -> None:
        """Fill and land every target. Raises KvTransferError. When this ends, cancelled or not,
        nothing writes into the targets any more."""
        ...

    async def close(self) -> None:
        """Let go of sockets and maps. Reads in progress fail."""
        ...


async def quiet(work: asyncio.Future[T], stop: Callable[[], object]) -> T:
    """Wait for `work` that a cancellation cannot interrupt (a thread's). When cancelled, calls
    `stop`, waits until the work has really ended, and only then lets the cancellation through."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop()
        await settled(work)
        raise


async def settled(work: asyncio.Future[T]) -> None:
    """Wait until `work` is over, whatever its outcome, through any number of cancellations; the
    last one is raised again."""
    cancelled = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if not work.cancelled():
        work.exception()  # seen, so that it is not reported as lost
    if cancelled is not None:
        raise cancelled


async def in_time(work: Awaitable[T], seconds: float, what: str) -> T:
    """Await with a deadline; raises PeerLost naming `what` when it passes."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise PeerLost(f"{what} took more than {seconds:g} s") from None


class Tokens:
    """One-use tokens that admit to a data channel. Issued over the authenticated control channel;
    each lives `seconds`, and at most `limit` are out at once (the oldest go first)."""

    def __init__(self, *, seconds: float = 30.0, limit: int = 1024) -> None:
        self._seconds = seconds
        self._limit = limit
        self._until: dict[bytes, float] = {}  # in order of issue, so of expiry

    def issue(self, now: float) -> bytes:
        """A fresh token."""
        while self._until:
            oldest = next(iter(self._until))
            if self._until[oldest] > now and len(self._until) < self._limit:
                break
            del self._until[oldest]
        token = secrets.token_bytes(TOKEN_BYTES)
        self._until[token] = now + self._seconds
        return token

    def redeem(self, token: bytes, now: float) -> bool:
        """True once for each token, while it lives."""
        return self._until.pop(token, float("-inf")) > now
