"""The other ranks of a worker, as its child processes: started, watched, ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import reduction
from multiprocessing.connection import Connection, wait
from pathlib import Path

from baton.devices import device_of
from engine.executor import ExecutorBroken
from engine.parallel.bell import Bell
from engine.parallel.message import Kind, Move, pack_move, say
from engine.parallel.rank import END, READY, main
from engine.parallel.stage import Setup, model_module
from engine.parallel.store import Room

_START_SECONDS = 600.0  # reading the weights of a large model from a slow disk
_GRACE_SECONDS = 5.0  # from being told to end to being killed
_LOOK_SECONDS = 0.5  # between two looks at whether somebody has died

# One server imports torch, then every rank is a fork of it: ready in a fraction of the time. It has
# no threads, and ends with this process.
_processes = multiprocessing.get_context("forkserver")


class Team:
    """Ranks 1 and up. They do what they are told in one order, whichever threads tell them;
    `output` is one thread's."""

    def __init__(self, setup: Setup) -> None:
        """Start them; `setup` is rank 0's. They read their weights while the caller reads its own;
        `wait_ready` follows."""
        self._topology, self._patience = setup.topology, setup.patience
        self._directory = Path(tempfile.mkdtemp(prefix="baton-ranks-"))
        self.rendezvous = self._directory / "rendezvous"
        setup = replace(setup, rendezvous=self.rendezvous)
        self._members: list[_Member] = []
        self._telling, self._bell = threading.Lock(), Bell()
        self._closing = threading.Event()
        self.lost = ""  # what is known of a rank that ended by itself, for people
        configuration = type(setup.config.source).__module__  # takes transformers seconds to import
        _processes.set_forkserver_preload(
            [main.__module__, configuration, model_module(setup.config, fused=setup.fused)]
        )
        try:
            for rank in range(1, setup.topology.ranks):
                self._members.append(_Member(_setup_of(setup, rank)))
        except BaseException:
            self.close()
            raise
        self._moves = _Moves(self._members, self.obituary)

    def watch(self, on_loss: Callable[[], None]) -> None:
        """From now on, have `lost` set when a rank ends by itself, and then `on_loss` called, on a
        thread of its own."""

        def look() -> None:
            wait([member.process.sentinel for member in self._members])
            if not self._closing.is_set():
                self.lost = self.obituary()
                on_loss()

        threading.Thread(target=look, name="watch", daemon=True).start()

    def wait_ready(self) -> None:
        """Return when all are ready. Raises ExecutorBroken if one ends before."""
        for member in self._members:
            if self._from(member, _START_SECONDS) != READY:
                raise ExecutorBroken(f"rank {member.rank} did not start")

    def open(self, room: Room, memory: int) -> None:
        """Have them begin with a new pool; `memory` is the descriptor of the worker's. Raises
        ExecutorBroken. No pass is under way, and no move."""
        try:
            with self._telling:
                for member in self._members:
                    member.connection.send_bytes(say(Kind.OPEN))
                    member.connection.send(room)
                    reduction.send_handle(member.connection, memory, member.process.pid)
        except OSError as error:
            raise ExecutorBroken(self.obituary()) from error
        self.wait_ready()

    def begin(self, message: bytes) -> None:
        """Tell them of a pass, or of what precedes one. Raises ExecutorBroken."""
        with self._telling:
            self._tell(message)

    def move(self, kind: Kind, blocks: Items[int], host: Items[int] = ()) -> Future[None]:
        """Have all of them copy blocks, behind the passes that they were told of. Done when all
        are; fails with ExecutorBroken. Raises ExecutorBroken."""
        with self._telling:
            number, done = self._moves.expect()
            self._tell(pack_move(Move(kind, number, tuple(blocks), tuple(host))))
        return done

    def ask(self, message: bytes) -> list[bytes]:
        """An answer from each. No pass is under way. Raises ExecutorBroken."""
        self.begin(message)
        return [self._from(member, self._patience) for member in self._members]

    def _tell(self, message: bytes) -> None:
        try:
            for member in self._members:
                member.connection.send_bytes(message)
        except OSError as error:
            raise ExecutorBroken(self.obituary()) from error

    def ready(self) -> bool:
        """Wait until there is an output to ask for; False if there is none, and `interrupt` was
        called since the last time. Raises ExecutorBroken as `output`."""
        try:
            return self._await(self._teller, self._longest, self._bell)
        finally:
            self._bell.silence()

    def interrupt(self) -> None:
        """End the wait in `ready`, or the next one. Never blocks; on any thread."""
        self._bell.ring()

    def output(self) -> bytes:
        """The output of the oldest pass that has not been asked for. Raises ExecutorBroken, at the
        latest when every stage may have taken as long as it may."""
        return self._from(self._teller, self._longest)

    def obituary(self) -> str:
        """What became of them, for people; waits a moment for one to be found dead."""
        deadline = time.monotonic() + 2 * _LOOK_SECONDS
        while not (dead := self._dead()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return dead or "the ranks of this worker do not answer each other"

    def close(self) -> None:
        """End them, by force if need be. Idempotent."""
        self._closing.set()
        for member in self._members:
            member.dismiss()
        deadline = time.monotonic() + _GRACE_SECONDS
        for member in self._members:
            member.end(max(0.0, deadline - time.monotonic()))
        self._bell.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _teller(self) -> _Member:
        return self._members[self._topology.teller - 1]

    @property
    def _longest(self) -> float:
        return self._patience * self._topology.pipeline

    def _from(self, member: _Member, seconds: float) -> bytes:
        try:
            self._await(member, seconds)
            return member.connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise ExecutorBroken(self.obituary()) from error

    def _await(self, member: _Member, seconds: float, *others: Bell) -> bool:
        """Wait until there is a message from this member: True; or, False, until one of `others`
        has rung. Raises ExecutorBroken."""
        deadline = time.monotonic() + seconds
        bells = [bell.fileno() for bell in others]
        while not (found := wait([member.connection, *bells], _LOOK_SECONDS)):
            if dead := self._dead():
                raise ExecutorBroken(dead)
            if time.monotonic() > deadline:
                raise ExecutorBroken(f"rank {member.rank} has not answered for {seconds:.0f} s")
        return member.connection in found

    def _dead(self) -> str:
        codes = ((member.rank, member.process.exitcode) for member in self._members)
        return ", ".join(
            f"rank {rank} ended with {code}" for rank, code in codes if code is not None
        )


class _Moves:
    """Moves that are under way. A thread waits for what the ranks say of them, from the first move
    until they have ended."""

    def __init__(self, members: list[_Member], obituary: Callable[[], str]) -> None:
        self._members, self._obituary = members, obituary
        self._lock = threading.Lock()
        self._under_way: dict[int, tuple[Future[None], set[int]]] = {}  # who has not said it yet
        self._number = 0
        self._lost: ExecutorBroken | None = None
        self._thread: threading.Thread | None = None

    def expect(self) -> tuple[int, Future[None]]:
        """The number of a new move, and its end. Raises ExecutorBroken if a rank has ended."""
        with self._lock:
            if self._lost is not None:
                raise self._lost
            if self._thread is None:
                self._thread = threading.Thread(target=self._listen, name="moves", daemon=True)
                self._thread.start()
            self._number += 1
            done: Future[None] = Future()
            self._under_way[self._number] = done, {member.rank for member in self._members}
            return self._number, done

    def _listen(self) -> None:
        ranks = {member.said: member.rank for member in self._members}
        try:
            while True:
                for said in wait(list(ranks)):
                    assert isinstance(said, Connection)
                    self._done(int(said.recv_bytes()), ranks[said])
        except (EOFError, OSError):
            self._fail(ExecutorBroken(self._obituary()))

    def _done(self, number: int, rank: int) -> None:
        with self._lock:
            done, missing = self._under_way[number]
            missing.remove(rank)
            if missing:
                return
            del self._under_way[number]
        done.set_result(None)

    def _fail(self, error: ExecutorBroken) -> None:
        with self._lock:
            self._lost = error
            left = [done for done, _ in self._under_way.values()]
            self._under_way.clear()
        for done in left:
            done.set_exception(error)


class _Member:
    """One process, the line to it, and `said`, where it tells of moves that have ended."""

    def __init__(self, setup: Setup) -> None:
        self.rank = setup.topology.rank
        self.connection, theirs = _processes.Pipe()
        self.said, saying = _processes.Pipe(duplex=False)
        with theirs, saying:
            self.process = _processes.Process(
                target=main, args=(theirs, saying), name=f"rank {self.rank}", daemon=True
            )
            self.process.start()
        self.connection.send(setup)

    def dismiss(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(END)

    def end(self, grace: float) -> None:
        """See to it that it has ended, by force after `grace` seconds."""
        self.process.join(grace)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.connection.close()


def _setup_of(setup: Setup, rank: int) -> Setup:
    return replace(setup, topology=setup.topology.at(rank), device=device_of(setup.device, rank))
