"""The other ranks of a worker, as its child processes: started, watched, ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
import tempfile
import time
from dataclasses import replace
from multiprocessing import reduction
from pathlib import Path

from engine.executor import ExecutorBroken
from engine.parallel.rank import END, READY, main
from engine.parallel.stage import Setup, model_module

_START_SECONDS = 600.0  # reading the weights of a large model from a slow disk
_GRACE_SECONDS = 5.0  # from being told to end to being killed
_LOOK_SECONDS = 0.5  # between two looks at whether somebody has died

# One server imports torch, then every rank is a fork of it: ready in a fraction of the time. It has
# no threads, and ends with this process.
_processes = multiprocessing.get_context("forkserver")


class Team:
    """Ranks 1 and up. `begin` and `output` may be called by different threads, one each."""

    def __init__(self, setup: Setup, memory: int) -> None:
        """Start them; `setup` is rank 0's, `memory` the descriptor of the KV pool. They read their
        weights while the caller reads its own; `wait_ready` follows."""
        self._topology, self._patience = setup.topology, setup.patience
        self._directory = Path(tempfile.mkdtemp(prefix="baton-ranks-"))
        self.rendezvous = self._directory / "rendezvous"
        setup = replace(setup, rendezvous=self.rendezvous)
        self._members: list[_Member] = []
        configuration = type(setup.config.source).__module__  # takes transformers seconds to import
        _processes.set_forkserver_preload(
            [main.__module__, configuration, model_module(setup.config)]
        )
        try:
            for rank in range(1, setup.topology.ranks):
                self._members.append(_Member(_setup_of(setup, rank), memory))
        except BaseException:
            self.close()
            raise

    def wait_ready(self) -> None:
        """Return when all are ready. Raises ExecutorBroken if one ends before."""
        for member in self._members:
            if self._from(member, _START_SECONDS) != READY:
                raise ExecutorBroken(f"rank {member.rank} did not start")

    def begin(self, message: bytes) -> None:
        """Tell them of a pass. Raises ExecutorBroken."""
        try:
            for member in self._members:
                member.connection.send_bytes(message)
        except OSError as error:
            raise ExecutorBroken(self.obituary()) from error

    def output(self) -> bytes:
        """The output of the oldest pass that has not been asked for. Raises ExecutorBroken, at the
        latest when every stage may have taken as long as it may."""
        teller = self._members[self._topology.teller - 1]
        return self._from(teller, self._patience * self._topology.pipeline)

    def obituary(self) -> str:
        """What became of them, for people; waits a moment for one to be found dead."""
        deadline = time.monotonic() + 2 * _LOOK_SECONDS
        while not (dead := self._dead()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return dead or "the ranks of this worker do not answer each other"

    def close(self) -> None:
        """End them, by force if need be. Idempotent."""
        for member in self._members:
            member.dismiss()
        for member in self._members:
            member.end()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _from(self, member: _Member, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        try:
            while not member.connection.poll(_LOOK_SECONDS):
                if dead := self._dead():
                    raise ExecutorBroken(dead)
                if time.monotonic() > deadline:
                    raise ExecutorBroken(f"rank {member.rank} has not answered for {seconds:.0f} s")
            return member.connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise ExecutorBroken(self.obituary()) from error

    def _dead(self) -> str:
        codes = ((member.rank, member.process.exitcode) for member in self._members)
        return ", ".join(
            f"rank {rank} ended with {code}" for rank, code in codes if code is not None
        )


class _Member:
    """One process and the line to it."""

    def __init__(self, setup: Setup, memory: int) -> None:
        self.rank = setup.topology.rank
        self.connection, theirs = _processes.Pipe()
        with theirs:
            self.process = _processes.Process(
                target=main, args=(theirs,), name=f"rank {self.rank}", daemon=True
            )
            self.process.start()
        self.connection.send(setup)
        reduction.send_handle(self.connection, memory, self.process.pid)

    def dismiss(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(END)

    def end(self) -> None:
        """See to it that it has ended."""
        self.process.join(_GRACE_SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.connection.close()


def _setup_of(setup: Setup, rank: int) -> Setup:
    return replace(setup, topology=setup.topology.at(rank), device=device_of(setup.device, rank))


def device_of(device: str, rank: int) -> str:
    """The device of a rank, where `device` is rank 0's: GPUs are taken in order."""
    kind, _, number = device.partition(":")
    return f"{kind}:{int(number or 0) + rank}" if kind == "cuda" else device
