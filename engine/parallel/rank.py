"""What runs in the process of a rank other than the first.

It is told the passes over a connection and runs its share of them, in order, over the KV pool that
it maps. It ends with the process that started it, however that ends: a thread waits for that alone,
so no collective can hide it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.connection import Connection
from queue import SimpleQueue

import torch

from engine.model.memory import map_memory
from engine.model.pool import KvPool
from engine.model.runner import Threads
from engine.parallel.cache import PartialCache
from engine.parallel.message import pack_output, unpack
from engine.parallel.stage import Setup, Stage

READY = b"ready"
END = b""


def main(connection: Connection) -> None:
    """Serve until told to end. First on the connection are a Setup and the pool's descriptor."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the worker's to answer: it may drain
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow, name="follow", daemon=True).start()
    setup: Setup = connection.recv()
    fd = reduction.recv_handle(connection)
    Threads(setup.threads).apply()
    size = setup.blocks * setup.geometry.block_bytes
    pool = KvPool(setup.geometry, setup.blocks, buffer=map_memory(fd, size))
    os.close(fd)
    stage, cache = Stage(setup), PartialCache(pool, setup.topology)
    connection.send_bytes(READY)
    tell: Callable[[bytes], None] = connection.send_bytes
    if setup.topology.pipeline > 1 and setup.topology.rank == setup.topology.teller:
        tell = Teller(connection).tell
    with torch.inference_mode(), contextlib.suppress(EOFError):  # the worker is gone
        while (message := connection.recv_bytes()) != END:
            batch = unpack(message, setup.geometry.block_size, setup.device)
            output = stage.run(batch, cache)
            if output is not None and setup.topology.rank == setup.topology.teller:
                tell(pack_output(output))


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


def _follow() -> None:
    """End when the worker has ended."""
    worker = multiprocessing.parent_process()
    assert worker is not None
    worker.join()
    os._exit(1)
