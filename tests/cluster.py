"""`baton serve` as users run it: real processes, the demo model, a port of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil
import pytest

START_SECONDS = 120.0
READY = re.compile(
    r"ready address=(?P<address>127\.0\.0\.1:\d+) model=(?P<model>\S+) "
    r"prefill=(?P<prefill>\d+) decode=(?P<decode>\d+)\n"
)


class Served:
    """A running `baton serve` and everything it started."""

    def __init__(self, *arguments: str) -> None:
        """Start it and wait for its ready line."""
        self.log: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launcher", "serve", "--address=127.0.0.1:0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True).start()
        watchdog = threading.Timer(START_SECONDS, self._process.kill)
        watchdog.start()
        self.ready_line = self._process.stdout.readline()
        watchdog.cancel()
        match = READY.fullmatch(self.ready_line)
        assert match is not None, f"{self.ready_line!r}\n" + "".join(self.log)
        self.address, self.model = match["address"], match["model"]

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.log.append(line)

    @property
    def pid(self) -> int:
        """The process that the others belong to."""
        return self._process.pid

    def processes(self) -> dict[str, psutil.Process]:
        """Its children: `gateway`, `prefill`, `decode`, `redis`."""
        names = {}
        for child in psutil.Process(self.pid).children(recursive=True):
            words = child.cmdline()
            role = words[3] if words[1:3] == ["-m", "launcher"] else "redis"
            names[role] = child
        return names

    def wait_for_log(self, text: str, seconds: float = 60) -> None:
        """Wait until a line of the log has `text`."""
        end = time.monotonic() + seconds
        while not any(text in line for line in list(self.log)):
            assert time.monotonic() < end, f"no {text!r} in:\n" + "".join(self.log)
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Stop it; returns its exit code."""
        self._process.send_signal(number)
        try:
            return self._process.wait(seconds)
        finally:
            self._process.kill()
            for stream in (self._process.stdout, self._process.stderr):
                assert stream is not None
                stream.close()


def gone(processes: dict[str, psutil.Process], seconds: float = 10) -> bool:
    """Whether none of them runs, in a moment."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(
            p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes.values()
        ):
            return True
        time.sleep(0.05)
    return False


def redis_directory(process: psutil.Process) -> Path:
    """Where an embedded server keeps its files: it says so in its title."""
    title = " ".join(process.cmdline())
    return Path(title.partition("unixsocket:")[2].split()[0]).parent


@pytest.fixture(scope="session")
def cluster() -> Iterator[Served]:
    """One cluster for all tests that only talk to it."""
    served = Served("--log-level=warning")
    processes = served.processes()
    directory = redis_directory(processes["redis"])
    assert directory.exists()
    yield served
    assert served.stop(signal.SIGINT) == 0
    assert gone(processes)
    assert not directory.exists()
