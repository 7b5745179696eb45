"""The lease table: who may read which blocks, until when, and when they may be reused.

                    seal                 release
       FILLING ──────────────▶ SEALED ──────────────▶ RELEASED  ─┐
          │  │                  │  │                             │
          │  └── release ───────┼──┼─────▶ RELEASED (not valid) ─┤   no reader
          ├── time is up ───────┤  │       EXPIRED ──────────────┼─────────────▶ freed
          └── revoke ───────────┴──┘       REVOKED ──────────────┘

A lease is live in FILLING and SEALED. It ends once, and whatever comes later gets the answer that
its end gave, for twice the time to live; after that it is unknown, which reads as gone. Its
blocks are freed when it has ended and no thread of this process reads them any more. Remote
readers are not counted: what they copy counts only if `release` says that the lease was live.

Pure: reads no clock (`now` is passed in, in seconds) and does no I/O. Not thread-safe.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from baton.errors import KvTransferError, Overloaded

LEASE_ID_BYTES = 16


class LeaseState(Enum):
    """Where a lease stands. Legal moves are in `Lease.move`."""

    FILLING = auto()
    SEALED = auto()
    RELEASED = auto()
    EXPIRED = auto()
    REVOKED = auto()


_ENDS = {LeaseState.RELEASED, LeaseState.EXPIRED, LeaseState.REVOKED}
_MOVES = {
    LeaseState.FILLING: {LeaseState.SEALED} | _ENDS,
    LeaseState.SEALED: _ENDS,
    LeaseState.RELEASED: set(),
    LeaseState.EXPIRED: set(),
    LeaseState.REVOKED: set(),
}


@dataclass(slots=True, eq=False)
class Lease:
    """One lease. Only its table changes it."""

    id: bytes
    blocks: tuple[int, ...]  # the producer's block numbers, in order of position
    granted_at: float
    expires_at: float
    state: LeaseState = LeaseState.FILLING
    digests: list[int] = field(default_factory=list)  # of the blocks that are final, in one kind
    readers: int = 0
    ended_at: float = 0.0
    valid: bool = False  # released as committed, live and sealed
    freed: bool = False

    @property
    def live(self) -> bool:
        """Not ended. Whether its time is up is the table's business."""
        return self.state not in _ENDS

    def move(self, state: LeaseState) -> None:
        """Change state; a move that is not in the drawing is a bug in the caller."""
        if state not in _MOVES[self.state]:
            raise RuntimeError(f"lease {self.id.hex()}: {self.state.name} -> {state.name}")
        self.state = state


class LeaseTable:
    """All leases of one producer.

    `time_to_live` in seconds; a renewal extends a lease to max(old end, now + 2/3 time_to_live),
    but never past `max_age` after its grant. At most `max_blocks` blocks are held by leases that
    are not freed; one that is in several of them counts once.
    """

    def __init__(
        self,
        *,
        time_to_live: float,
        max_age: float,
        max_blocks: int,
        new_id: Callable[[], bytes] = lambda: secrets.token_bytes(LEASE_ID_BYTES),
    ) -> None:
        self.time_to_live = time_to_live
        self.max_age = max_age
        self.max_blocks = max_blocks
        self._new_id = new_id
        self._leases: dict[bytes, Lease] = {}
        self._holders: Counter[int] = Counter()  # leases that hold each block
        self._freed: list[bytes] = []

    @property
    def held_blocks(self) -> int:
        """Blocks that may not be reused yet."""
        return len(self._holders)

    @property
    def live(self) -> int:
        """Leases that have not ended."""
        return sum(lease.live for lease in self._leases.values())

    def __len__(self) -> int:
        """Leases remembered, ended ones included."""
        return len(self._leases)

    def find(self, lease_id: bytes) -> Lease | None:
        """The lease, live or ended; None when it is unknown."""
        return self._leases.get(lease_id)

    def grant(self, blocks: Sequence[int], now: float) -> Lease:
        """A new lease, in FILLING. Raises Overloaded at the cap."""
        new = sum(block not in self._holders for block in blocks)
        if len(self._holders) + new > self.max_blocks:
            raise Overloaded(
                f"{len(self._holders)} of {self.max_blocks} leasable KV blocks are leased",
                subject="leased KV blocks",
            )
        end = now + min(self.time_to_live, self.max_age)
        lease = Lease(self._new_id(), tuple(blocks), granted_at=now, expires_at=end)
        if lease.id in self._leases:
            raise RuntimeError("lease id drawn twice")
        self._leases[lease.id] = lease
        self._holders.update(blocks)
        return lease

    def finalize(self, lease_id: bytes, digests: Sequence[int], now: float) -> bool:
        """The next `len(digests)` blocks are final. False, and nothing done, once it has ended."""
        lease = self._live(lease_id, now)
        if lease is None:
            return False
        if lease.state is not LeaseState.FILLING:
            raise RuntimeError(f"lease {lease_id.hex()} is sealed")
        if len(lease.digests) + len(digests) > len(lease.blocks):
            raise RuntimeError(f"lease {lease_id.hex()}: more final blocks than it has")
        lease.digests.extend(digests)
        return True

    def seal(self, lease_id: bytes, now: float) -> bool:
        """Every block is final. False, and nothing done, once it has ended."""
        lease = self._live(lease_id, now)
        if lease is None:
            return False
        if len(lease.digests) != len(lease.blocks):
            raise RuntimeError(f"lease {lease_id.hex()}: sealed before every block is final")
        if lease.state is not LeaseState.SEALED:
            lease.move(LeaseState.SEALED)
        return True

    def renew(self, lease_id: bytes, now: float) -> float:
        """Extend a lease; returns its time to live, 0 when it is gone."""
        lease = self._live(lease_id, now)
        if lease is None:
            return 0.0
        wanted = max(lease.expires_at, now + self.time_to_live * 2 / 3)
        lease.expires_at = min(wanted, lease.granted_at + self.max_age)
        return lease.expires_at - now

    def release(self, lease_id: bytes, *, committed: bool, now: float) -> bool:
        """The consumer is done. True only when it `committed` a lease that was live and sealed
        at the first such call; repeating the call repeats the answer."""
        lease = self._live(lease_id, now)
        if lease is not None:
            lease.valid = committed and lease.state is LeaseState.SEALED
            self._end(lease, LeaseState.RELEASED, now)
            return lease.valid
        ended = self._leases.get(lease_id)
        return ended is not None and ended.valid and committed

    def revoke(self, lease_id: bytes, now: float) -> None:
        """The producer takes it back. Nothing happens when it has ended."""
        lease = self._live(lease_id, now)
        if lease is not None:
            self._end(lease, LeaseState.REVOKED, now)

    def begin_read(self, lease_id: bytes, first: int, count: int, now: float) -> Sequence[int]:
        """Count a reader in this process of final positions [first, first + count); returns their
        block numbers. Pair with `end_read`.

        Raises KvTransferError when the lease is gone or the positions are not final.
        """
        lease = self._live(lease_id, now)
        if lease is None:
            raise KvTransferError("lease is gone")
        if first < 0 or count < 1 or first + count > len(lease.digests):
            raise KvTransferError(f"blocks {first}+{count} of the lease are not final")
        return self._read(lease, first, count)

    def begin_digest(self, lease_id: bytes, first: int, ready: int, now: float) -> Sequence[int]:
        """Count a reader of the positions [first, ready), final or not, as `begin_read`; none when
        the lease is gone. Pair with `end_read` unless it is empty."""
        lease = self._live(lease_id, now)
        if lease is None or ready <= first:
            return ()
        return self._read(lease, first, ready - first)

    def end_read(self, lease_id: bytes) -> None:
        """The reader reads no more."""
        lease = self._leases[lease_id]
        lease.readers -= 1
        self._free_if_quiet(lease)

    def sweep(self, now: float) -> list[bytes]:
        """Expire what is due and forget old ends; returns the leases that expired now. Visits
        every lease: deadlines are not in order."""
        expired = []
        for lease in list(self._leases.values()):
            if lease.live:
                if self._live(lease.id, now) is None:
                    expired.append(lease.id)
            elif lease.freed and now - lease.ended_at > 2 * self.time_to_live:
                del self._leases[lease.id]
        return expired

    def take_freed(self) -> list[bytes]:
        """Leases freed since the last call, each once."""
        freed, self._freed = self._freed, []
        return freed

    def check_integrity(self) -> None:
        """Raise AssertionError when the books do not balance."""
        held = [block for one in self._leases.values() if not one.freed for block in one.blocks]
        assert Counter(held) == self._holders
        assert len(self._holders) <= self.max_blocks
        for lease in self._leases.values():
            assert lease.readers >= 0
            assert lease.freed == (not lease.live and lease.readers == 0)
            assert len(lease.digests) <= len(lease.blocks)
            assert not lease.valid or lease.state is LeaseState.RELEASED
            if lease.state is LeaseState.SEALED or lease.valid:
                assert len(lease.digests) == len(lease.blocks)
            assert lease.expires_at <= lease.granted_at + self.max_age

    def _live(self, lease_id: bytes, now: float) -> Lease | None:
        """The lease if it is live at `now`; one whose time is up expires here."""
        lease = self._leases.get(lease_id)
        if lease is None or not lease.live:
            return None
        if now >= lease.expires_at:
            self._end(lease, LeaseState.EXPIRED, now)
            return None
        return lease

    def _read(self, lease: Lease, first: int, count: int) -> Sequence[int]:
        lease.readers += 1
        return lease.blocks[first : first + count]

    def _end(self, lease: Lease, state: LeaseState, now: float) -> None:
        lease.move(state)
        lease.ended_at = now
        self._free_if_quiet(lease)

    def _free_if_quiet(self, lease: Lease) -> None:
        if not lease.live and lease.readers == 0 and not lease.freed:
            lease.freed = True
            for block in lease.blocks:
                self._holders[block] -= 1
                if not self._holders[block]:
                    del self._holders[block]
            self._freed.append(lease.id)
