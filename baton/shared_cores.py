"""Cores that workers on one host lend each other: who has nothing to do computes on none.

Every worker owns some of the host's cores, and a file that all of them open says which cores are in
use: one lock on a byte for each core, held by whoever computes there, and one after those for each
core that its owner wants back. Locks end with the process that holds them, however it ends.

An owner holds its cores from its first pass until it has nothing more to do. Whoever borrows one
gives it back after each pass, so an owner that wakes up waits for the rest of one pass at most.

Knows numbers of cores only: where threads run is the kernel's choice.
"""

from __future__ import annotations

import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

from baton.errors import ConfigError

_LONGEST_WAIT = 0.25  # seconds; then an owner computes all the same, beside the borrower
_PAUSE = 0.0005


@dataclass(frozen=True, slots=True)
class Place:
    """Where one worker stands: `own` of the cores 0 .. total - 1, from `first` on."""

    path: Path
    first: int
    own: int
    total: int

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{self.path}:{self.first}:{self.own}:{self.total}"

    @classmethod
    def parse(cls, text: str) -> Place:
        """From PATH:FIRST:OWN:TOTAL. Raises ConfigError."""
        try:
            path, *numbers = text.rsplit(":", 3)
            first, own, total = map(int, numbers)
        except ValueError:
            first, own, total, path = 0, 0, 0, ""
        if not path or first < 0 or own < 1 or first + own > total:
            raise ConfigError(f"--shared-cores {text}: must be PATH:FIRST:OWN:TOTAL")
        return cls(Path(path), first, own, total)


class SharedCores:
    """The locks of one worker. One thread at a time."""

    def __init__(self, place: Place) -> None:
        """Raises ConfigError where the file cannot be opened."""
        self._own = range(place.first, place.first + place.own)
        self._others = [core for core in range(place.total) if core not in self._own]
        self._total = place.total
        self._holds_own = False
        self._borrowed: list[int] = []
        try:
            self._file = os.open(place.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"--shared-cores {place.path}: {error}") from error

    @property
    def own(self) -> int:
        """How many cores this worker always has."""
        return len(self._own)

    def take(self) -> int:
        """How many cores the next pass may use: this worker's own, and those that nobody uses."""
        if not self._holds_own:
            self._claim()
        self._borrowed = [core for core in self._others if self._borrow(core)]
        return len(self._own) + len(self._borrowed)

    def give_back(self) -> None:
        """The pass is over."""
        for core in self._borrowed:
            self._unlock(core)
        self._borrowed = []

    def rest(self) -> None:
        """There is nothing to do: others may have this worker's own cores, too. Idempotent."""
        if self._holds_own:
            for core in self._own:
                self._unlock(core)
            self._holds_own = False

    def close(self) -> None:
        """Give up everything. Idempotent."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _claim(self) -> None:
        """Take the own cores back, each when the pass on it is over, but wait for no longer than
        a borrower may be believed to compute."""
        end = time.monotonic() + _LONGEST_WAIT
        wanted = [core for core in self._own if not self._lock(core)]
        for core in wanted:
            self._lock(self._total + core)
        while wanted and time.monotonic() < end:
            time.sleep(_PAUSE)
            wanted = [core for core in wanted if not self._lock(core)]
        for core in self._own:
            self._unlock(self._total + core)
        self._holds_own = True

    def _borrow(self, core: int) -> bool:
        if not self._lock(self._total + core):
            return False
        free = self._lock(core)
        self._unlock(self._total + core)
        return free

    def _lock(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError:
            return False
        return True

    def _unlock(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)
