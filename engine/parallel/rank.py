"""What runs in the process of a rank other than the first.

It is told over a connection what to do, and does it in order: its share of the passes, and of moves
of KV, which go on beside them on a GPU. It ends with the process that started it, however that
ends: a thread waits for that alone, so no collective can hide it.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import reduction
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch

from engine.gpu.memory import Memory, begin_trial, end_trial
from engine.model.memory import map_memory
from engine.model.pool import KvPool
from engine.model.runner import Threads
from engine.parallel.message import Kind, Move, kind_of, pack_output, unpack, unpack_move
from engine.parallel.stage import Setup, Stage
from engine.parallel.store import MappedStore, OwnStore, Room, open_store
from scheduling.plan import Capacity

if TYPE_CHECKING:
    from engine.parallel.lockstep import Follower

_log = logging.getLogger(__name__)

READY = b"ready"
END = b""


def main(connection: Connection, saying: Connection) -> None:
    """Serve until told to end. First on the connection is a Setup; the ends of moves are told on
    `saying`."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the worker's to answer: it may drain
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow, name="follow", daemon=True).start()
    setup: Setup = connection.recv()
    Threads(setup.threads).apply()
    rank = Rank(setup, connection, saying)
    connection.send_bytes(READY)
    with contextlib.suppress(EOFError):  # the worker is gone
        while (message := connection.recv_bytes()) != END:
            rank.do(message)
    rank.close()


class Rank:
    """Does what rank 0 says."""

    def __init__(self, setup: Setup, connection: Connection, saying: Connection) -> None:
        """Reads the weights, and meets the others."""
        self._setup, self._connection, self._saying = setup, connection, saying
        self._stage = Stage(setup)
        self._store: MappedStore | OwnStore | None = None
        self._mover: Mover | None = None
        self._follower: Follower | None = None
        self._tells = setup.topology.rank == setup.topology.teller
        self._tell: Callable[[bytes], None] = connection.send_bytes
        if setup.topology.pipeline > 1 and self._tells:
            self._tell = Teller(connection).tell

    def do(self, message: bytes) -> None:
        """What a message asks for."""
        match kind_of(message):
            case Kind.PASS | Kind.ROWS | Kind.RECORD:
                with torch.inference_mode():
                    self._run(message)
            case Kind.OPEN:
                self._open(self._connection.recv(), reduction.recv_handle(self._connection))
            case Kind.TRIAL:
                begin_trial(self._stage.device)
            case Kind.MEASURE:
                self._tell(pickle.dumps(self._measure()))
            case _:
                assert self._mover is not None
                self._mover.begin(unpack_move(message))

    def close(self) -> None:
        """Give the pool up, and leave the others."""
        self._give_up()
        self._stage.abort()

    def _run(self, message: bytes) -> None:
        if self._follower is not None:
            self._follower.do(message)
            return
        assert self._store is not None
        batch = self._store.place(unpack(message, self._setup.geometry.block_size))
        output = self._stage.run(batch, self._store.cache)
        if output is not None and self._tells:
            self._tell(pack_output(output))

    def _measure(self) -> Memory:
        """What was taken since the trial began; gives the pool up."""
        assert isinstance(self._store, OwnStore)
        trial = self._store.pool.storage.nbytes
        self._give_up()
        return end_trial(self._stage.device, trial)

    def _open(self, room: Room, fd: int) -> None:
        """Begin with a new pool."""
        self._give_up()  # before the next one takes its memory
        memory = map_memory(fd, room.capacity.blocks * self._setup.geometry.block_bytes)
        os.close(fd)
        self._store = store = open_store(self._setup, room, memory)
        if isinstance(store, OwnStore):
            self._mover = Mover(store, self._saying)
            if self._setup.lockstep:
                self._follower = follower(self._stage, store.pool, room.capacity)
        self._tell(READY)

    def _give_up(self) -> None:
        if self._mover is not None:
            self._mover.close()
        self._store = self._mover = self._follower = None


def follower(stage: Stage, pool: KvPool, capacity: Capacity) -> Follower:
    """One that does its share of launches in `pool`."""
    from engine.parallel.lockstep import Follower

    assert stage.shards is not None
    return Follower(stage.fused_model(), pool, capacity, stage.shards)


class Teller:
    """Sends outputs in their order, on a thread of its own. The worker does not read while it tells
    this rank of the next pass: if this rank waited for that with a long output instead of reading
    what it is told, both would wait for ever."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outputs: SimpleQueue[bytes] = SimpleQueue()
        threading.Thread(target=self._send, name="tell", daemon=True).start()

    def tell(self, output: bytes) -> None:
        """Send it when those before are through; returns at once."""
        self._outputs.put(output)

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # the worker is gone
            while True:
                self._connection.send_bytes(self._outputs.get())


class Mover:
    """Does this rank's share of moves, on a GPU beside the passes, and says when each is done. One
    that fails ends the rank: its KV is lost."""

    def __init__(self, store: OwnStore, saying: Connection) -> None:
        self._saying, self._lock = saying, threading.Lock()
        self._staging, self._copies = store.staging, store.copies(self._ended)
        # Interpreted kernels run one at a time: on a CPU, the passes wait for a move.
        beside = store.pool.storage.device.type == "cuda"
        self._saves, self._loads = (ThreadPoolExecutor(1) if beside else None for _ in range(2))

    def begin(self, move: Move) -> None:
        """Begin, behind all that the device was given so far."""
        match move.kind:
            case Kind.SAVE:
                self._run(self._saves, self._staging.save, move)
            case Kind.LOAD:
                self._run(self._loads, self._staging.load, move)
            case Kind.SWAP_OUT:
                self._copies.out(move.number, move.blocks, move.host)
            case Kind.SWAP_IN:
                self._copies.back(move.number, move.blocks, move.host)

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._copies.close()
        for thread in (self._saves, self._loads):
            if thread is not None:
                thread.shutdown()

    def _ended(self, number: int, error: Exception | None) -> None:
        """A move has ended; on any thread."""
        if error is not None:
            _log.critical("KV was lost on its way to or from the host", exc_info=error)
            os._exit(1)
        with self._lock, contextlib.suppress(OSError):  # the worker is gone
            self._saying.send_bytes(b"%d" % number)

    def _run(
        self, beside: ThreadPoolExecutor | None, copy: Callable[[tuple[int, ...]], None], move: Move
    ) -> None:
        def run() -> None:
            try:
                copy(move.blocks)
            except Exception as error:
                self._ended(move.number, error)
            else:
                self._ended(move.number, None)

        if beside is None:
            run()
        else:
            beside.submit(run)


def _follow() -> None:
    """End when the worker has ended."""
    worker = multiprocessing.parent_process()
    assert worker is not None
    worker.join()
    os._exit(1)
