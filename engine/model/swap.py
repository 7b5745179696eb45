"""Copies KV blocks between the device and host memory, beside the passes.

Each direction has a queue and a thread of its own, and on a GPU a stream. Who is swapped, and
which blocks are whose, is the scheduler's business (scheduling/plan.py: Swap).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from typing import Protocol

from baton.errors import ConfigError
from engine.executor import ExecutorBroken
from engine.model.host_pool import HostPool
from engine.model.pool import KvPool
from engine.model.swap_lane import OnEnd, Pair, SwapLane
from scheduling.plan import Swap


class Copies(Protocol):
    """Moves blocks between the device and the host, and says when a move has ended, in any order
    and on any thread. What was asked of the device before a move was asked for comes first."""

    def out(self, number: int, device: Items[int], host: Items[int]) -> None:
        """Begin to copy blocks `device` into blocks `host`; `number` names the move."""
        ...

    def back(self, number: int, device: Items[int], host: Items[int]) -> None:
        """Begin to copy blocks `host` into blocks `device`."""
        ...

    def close(self) -> None:
        """Stop; what is queued is given up. Idempotent."""
        ...


class PoolCopies:
    """The Copies of one pool in this process. Threads and host memory are taken when the first
    move needs them."""

    def __init__(
        self, pool: KvPool, host_blocks: int, on_end: OnEnd, *, bandwidth: float = 0.0
    ) -> None:
        """`bandwidth`: most bytes per second each way; 0 for no limit. Raises ConfigError for a
        device it cannot copy from."""
        device = pool.storage.device
        if host_blocks and device.type not in ("cpu", "cuda"):
            raise ConfigError(f"--host-kv-memory: swapping works on cpu and cuda, not on {device}")
        self._pool = pool
        self._host = HostPool(pool.geometry, host_blocks, pinned=device.type == "cuda")
        self._out, self._in = (
            SwapLane(name, device, block_bytes=pool.block_bytes, bandwidth=bandwidth, on_end=on_end)
            for name in ("swap out", "swap in")
        )

    def out(self, number: int, device: Items[int], host: Items[int]) -> None:
        """See Copies."""
        self._out.put(number, self._blocks(device, host))

    def back(self, number: int, device: Items[int], host: Items[int]) -> None:
        """See Copies."""
        self._in.put(number, ((there, here) for here, there in self._blocks(device, host)))

    def close(self) -> None:
        """See Copies."""
        self._out.close()
        self._in.close()

    def _blocks(self, device: Items[int], host: Items[int]) -> Iterator[Pair]:
        """Blocks on the device and on the host, looked up as they are copied: that is when host
        memory is taken."""
        for here, there in zip(device, host, strict=True):
            yield self._pool.storage[here], self._host.block(there)


class Swapper:
    """What has become of the swaps. `swap_out` and what follows are one thread's, the
    executor's."""

    def __init__(self, copies: Callable[[OnEnd], Copies]) -> None:
        """`copies` makes what moves the blocks."""
        self._changed = threading.Condition()
        self._unfinished: set[int] = set()
        self._finished: list[int] = []  # not collected yet
        self._error: Exception | None = None
        self._copies = copies(self._report)

    @classmethod
    def of(cls, pool: KvPool, host_blocks: int, *, bandwidth: float = 0.0) -> Swapper:
        """That of one pool in this process; see PoolCopies."""
        return cls(lambda on_end: PoolCopies(pool, host_blocks, on_end, bandwidth=bandwidth))

    def swap_out(self, swaps: Iterable[Swap]) -> None:
        """Begin to copy to the host. What was asked of the device before comes first."""
        for swap in swaps:
            self._begin(self._copies.out, swap)

    def swap_in(self, swaps: Iterable[Swap]) -> None:
        """Begin to copy to the device. What was asked of the device before comes first."""
        for swap in swaps:
            self._begin(self._copies.back, swap)

    def wait_for(self, swaps: Iterable[Swap]) -> None:
        """Return when all of these are complete."""
        numbers = {swap.number for swap in swaps}
        self._wait(lambda: numbers.isdisjoint(self._unfinished))

    def wait_for_any(self) -> None:
        """Return when there is something to collect, or nothing under way."""
        self._wait(lambda: bool(self._finished) or not self._unfinished)

    def collect(self) -> tuple[int, ...]:
        """The swaps that have completed since the last call. Raises ExecutorBroken if one could
        not be: its KV is lost, and so is the sense of going on."""
        with self._changed:
            self._raise_error()
            finished = tuple(self._finished)
            self._finished.clear()
        return finished

    def close(self) -> None:
        """Stop; copies that are queued are given up. Idempotent."""
        self._copies.close()

    def _begin(self, move: Callable[[int, Items[int], Items[int]], None], swap: Swap) -> None:
        with self._changed:
            self._unfinished.add(swap.number)
        move(swap.number, swap.device, swap.host)

    def _wait(self, met: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: met() or self._error is not None)
            self._raise_error()

    def _report(self, number: int, error: Exception | None) -> None:
        """A move has ended."""
        with self._changed:
            self._unfinished.discard(number)
            if error is None:
                self._finished.append(number)
            else:
                self._error = error
            self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise ExecutorBroken("KV was lost on its way to or from the host") from self._error
