"""What all ranks do with KV as one, where each has a pool of its own: hand-off and swaps.

Every move is told to all ranks, with the passes and in one order, and is over when all have done
their share of it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence as Items
from concurrent.futures import Future

from engine.executor import ExecutorBroken
from engine.gpu.staging import Staging
from engine.model.swap_lane import OnEnd
from engine.parallel.message import Kind
from engine.parallel.store import OwnStore
from engine.parallel.team import Team


class JointStaging:
    """The StagedBlocks (engine/staged.py) of several ranks: whole blocks, which all of them save
    their shares to and load them from. Raises ExecutorBroken if a rank is lost."""

    def __init__(self, team: Team, own: Staging, patience: float) -> None:
        """`own` is rank 0's; `patience`: longest wait for the others, seconds."""
        self._team, self._own, self._patience = team, own, patience

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self._own.blocks

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self._own.block_bytes

    def block(self, index: int) -> memoryview:
        """See StagedBlocks."""
        return self._own.block(index)

    def save(self, blocks: Items[int]) -> None:
        """See StagedBlocks."""
        if blocks:
            done = self._team.move(Kind.SAVE, blocks)
            self._own.save(blocks)
            self._wait(done)

    def load(self, blocks: Items[int]) -> None:
        """See StagedBlocks."""
        if blocks:
            done = self._team.move(Kind.LOAD, blocks)
            self._own.load(blocks)
            self._wait(done)

    def _wait(self, done: Future[None]) -> None:
        try:
            done.result(self._patience)
        except TimeoutError as error:
            raise ExecutorBroken("a rank does not say that it has copied KV") from error


class JointCopies:
    """The Copies (engine/model/swap.py) of all ranks, each between its pool and host memory of its
    own."""

    def __init__(self, team: Team, own: OwnStore, on_end: OnEnd) -> None:
        """`own` is rank 0's."""
        self._team, self._on_end = team, on_end
        self._own = own.copies(self._ended)
        self._half: set[int] = set()  # done here, or by all others
        self._lock = threading.Lock()

    def out(self, number: int, device: Items[int], host: Items[int]) -> None:
        """See Copies."""
        self._others(number, self._team.move(Kind.SWAP_OUT, device, host))
        self._own.out(number, device, host)

    def back(self, number: int, device: Items[int], host: Items[int]) -> None:
        """See Copies."""
        self._others(number, self._team.move(Kind.SWAP_IN, device, host))
        self._own.back(number, device, host)

    def close(self) -> None:
        """See Copies."""
        self._own.close()

    def _others(self, number: int, done: Future[None]) -> None:
        def ended(done: Future[None]) -> None:
            error = done.exception()
            self._ended(number, error if isinstance(error, Exception) else None)

        done.add_done_callback(ended)

    def _ended(self, number: int, error: Exception | None) -> None:
        with self._lock:
            if error is None and number not in self._half:
                self._half.add(number)
                return
            self._half.discard(number)
        self._on_end(number, error)
